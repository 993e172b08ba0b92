/** The history as a file for elsewhere: JSON with everything, Markdown with the words, HTML with words and pictures. */

import { resolutionText } from "./pictures.js";

/** By name: file ending, media type, and what makes the text of it. */
export const FORMATS = {
  json: { extension: "json", type: "application/json", make: toJson },
  markdown: { extension: "md", type: "text/markdown", make: toMarkdown },
  html: { extension: "html", type: "text/html", make: toHtml },
};

/** All that is known of the answers, thumbnails as data: URLs, times of the server in seconds. */
export function toJson(entries) {
  return JSON.stringify(entries, null, 2);
}

/** Oldest first, an answer a section. */
export function toMarkdown(entries) {
  const sections = [...entries].reverse().map((entry) => {
    const question = quoted(entry.prompt);
    return `## ${new Date(entry.time).toLocaleString()}\n\n${question}\n\n${entry.text}\n\n${facts(entry)}\n`;
  });
  return `# FastVLM answers\n\n${sections.join("\n")}`;
}

/** A page of its own, oldest first. */
export function toHtml(entries) {
  const rows = [...entries].reverse().map((entry) => {
    const image = entry.thumbnail ? `<img src="${escaped(entry.thumbnail)}" alt="${escaped(entry.source)}">` : "";
    const [answer, prompt, figures] = [entry.text, entry.prompt, facts(entry)].map(escaped);
    return `<tr><td>${image}<td><p><strong>${answer}</strong><p>${prompt}<p><small>${figures}</small>`;
  });
  const style = "body{font:16px system-ui;margin:2rem} td{vertical-align:top;padding:.5rem 1rem} p{margin:0 0 .25rem}";
  return `<!doctype html>
<html lang="en"><meta charset="utf-8"><title>FastVLM answers</title><style>${style}</style>
<h1>FastVLM answers</h1>
<table>
${rows.join("\n")}
</table>
`;
}

/** Let the browser save a text as a file. */
export function download(text, name, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000); // browsers read it after the click
}

function facts({ time, model, resolution, source, timings, usage }) {
  const parts = [time, source, model, resolutionText(resolution)];
  if (timings) parts.push(`TTFT ${Math.round(1000 * timings.ttft)} ms`);
  if (usage) parts.push(`${usage.completion_tokens} tokens`);
  return parts.filter(Boolean).join(" · ");
}

function quoted(text) {
  return text.split("\n").map((line) => `> ${line}`).join("\n");
}

function escaped(text) {
  const entities = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
  return text.replace(/[&<>"]/g, (character) => entities[character]);
}
