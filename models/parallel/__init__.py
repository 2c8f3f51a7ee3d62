"""The mesh, and programs of several devices and processes on it."""
