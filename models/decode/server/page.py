"""The page at `/`: a chat that streams, without anything from elsewhere."""

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>puna</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 1rem;
         color-scheme: light dark; background: Canvas; color: CanvasText; }
  .message { white-space: pre-wrap; overflow-wrap: anywhere; margin: .75rem 0;
             padding: .5rem .75rem; border-radius: .5rem; }
  .user { background: color-mix(in srgb, CanvasText 10%, Canvas); }
  .error { color: #c33; }
  textarea { width: 100%; box-sizing: border-box; font: inherit; }
  form { position: sticky; bottom: 0; background: Canvas; padding-bottom: .5rem; }
  img { display: block; max-width: 100%; max-height: 16rem; }
  details { margin: .5rem 0; }
  input { font: inherit; width: 100%; box-sizing: border-box; }
</style>
<h1>puna</h1>
<details>
  <summary>Settings</summary>
  <label>System message <input id="system"></label>
  <label>Temperature, empty for the model's own
    <input id="temperature" type="number" min="0" step="0.1"></label>
  <label>API key, if the server has one <input id="key" type="password"></label>
</details>
<main id="log" aria-live="polite"></main>
<form id="form">
  <label for="text">Message</label>
  <textarea id="text" rows="3" autofocus></textarea>
  <label PICTURES>Pictures <input id="pictures" type="file" accept="image/*" multiple></label>
  <button id="send">Send</button>
  <button id="stop" type="button" disabled>Stop</button>
  <button id="reset" type="button">New chat</button>
</form>
<script>
"use strict";
const at = id => document.getElementById(id), view = document.documentElement;
let messages = [], running = null;

function show(kind, text) {
  const box = document.createElement("div");
  box.className = "message " + kind;
  box.textContent = text;
  at("log").append(box);
  view.scrollTop = view.scrollHeight;
  return box;
}

// Keeps the end in view, unless the reader has scrolled up.
function add(box, text) {
  const follow = view.scrollHeight - view.scrollTop - view.clientHeight < 40;
  box.textContent += text;
  if (follow) view.scrollTop = view.scrollHeight;
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function send(text, files) {
  const asked = {role: "user", content: text}, shown = show("user", text);
  messages.push(asked);
  const mine = messages, box = show("assistant", "");
  const first = at("system").value ? [{role: "system", content: at("system").value}] : [];
  const body = {messages: [...first, ...mine], stream: true};
  if (at("temperature").value) body.temperature = Number(at("temperature").value);
  const headers = {"content-type": "application/json"};
  if (at("key").value) headers.authorization = "Bearer " + at("key").value;
  running = new AbortController();
  at("send").disabled = true; at("stop").disabled = false;
  try {
    const urls = await Promise.all(files.map(read));
    for (const url of urls) shown.append(Object.assign(new Image(), {src: url}));
    if (urls.length) asked.content = [
      ...urls.map(url => ({type: "image_url", image_url: {url}})), {type: "text", text}];
    const response = await fetch("v1/chat/completions",
      {method: "POST", headers, body: JSON.stringify(body), signal: running.signal});
    if (!response.ok) throw new Error((await response.json()).error.message);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let left = "";
    for (;;) {
      const {value, done} = await reader.read();
      if (done) break;
      const events = (left + value).split("\\n\\n");
      left = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
        const data = JSON.parse(event.slice(6));
        if (data.error) throw new Error(data.error.message);
        add(box, data.choices[0]?.delta?.content ?? "");
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  }
  if (box.textContent) mine.push({role: "assistant", content: box.textContent});
  else { mine.pop(); box.remove(); }
  running = null;
  at("send").disabled = false; at("stop").disabled = true;
}

at("form").addEventListener("submit", event => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (!text || running) return;
  const files = [...at("pictures").files];
  at("text").value = at("pictures").value = "";
  send(text, files);
});
at("text").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("reset").addEventListener("click", () => {
  running?.abort();
  messages = [];
  at("log").replaceChildren();
});
</script>
</html>
"""


def page(pictures: bool) -> str:
    """Its HTML; `pictures`: whether messages may have some."""
    return _PAGE.replace("PICTURES", "" if pictures else "hidden")
