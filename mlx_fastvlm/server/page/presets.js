/** Prompts with names: those of Apple's demo app to begin with, then whatever the user makes of them. */

import * as stored from "./stored.js";

const NAME = "mlx-fastvlm.presets";

const BUILT_IN = [
  {
    id: "describe",
    name: "Describe",
    prompt: "Describe the image in English.",
    suffix: "Output should be brief, about 15 words or less.",
  },
  {
    id: "expression",
    name: "Facial expression",
    prompt: "What is this person's facial expression?",
    suffix: "Output only one or two words.",
  },
  {
    id: "text",
    name: "Read text",
    prompt: "What is written in this image?",
    suffix: "Output only the text in the image.",
  },
  { id: "custom", name: "Custom", prompt: "What do you see?", suffix: "" },
];

/** The list of presets and which one is chosen. Events: "choose", when another is; "edit", when one has changed. */
export class Presets extends EventTarget {
  #settings;
  #list;

  /** @param settings remembers which preset is chosen. */
  constructor(settings) {
    super();
    this.#settings = settings;
    const kept = stored.read(NAME);
    this.#list = isList(kept) ? kept : structuredClone(BUILT_IN);
  }

  get list() {
    return this.#list;
  }

  get chosen() {
    return this.#list.find(({ id }) => id === this.#settings.get("preset")) ?? this.#list[0];
  }

  /** The question as the model gets it. */
  get question() {
    return [this.chosen.prompt, this.chosen.suffix].map((part) => part.trim()).filter(Boolean).join(" ");
  }

  choose(id) {
    this.#settings.set("preset", id);
    this.#keep("choose");
  }

  /** Change the chosen preset's name, prompt or suffix. */
  edit(field, text) {
    this.chosen[field] = text;
    this.#keep("edit");
  }

  add() {
    const id = `own-${Date.now().toString(36)}`;
    this.#list.push({ id, name: "New preset", prompt: "", suffix: "" });
    this.choose(id);
  }

  /** Remove the chosen preset; the last one stays. */
  remove() {
    if (this.#list.length === 1) return;
    const index = this.#list.indexOf(this.chosen);
    this.#list.splice(index, 1);
    this.choose(this.#list[Math.max(0, index - 1)].id);
  }

  /** Back to the presets that the page came with. */
  reset() {
    this.#list = structuredClone(BUILT_IN);
    this.choose(this.#list[0].id);
  }

  #keep(reason) {
    stored.write(NAME, this.#list);
    this.dispatchEvent(new Event(reason));
  }
}

function isList(value) {
  const fields = ["id", "name", "prompt", "suffix"];
  const isPreset = (entry) => fields.every((field) => typeof entry?.[field] === "string");
  return Array.isArray(value) && value.length > 0 && value.every(isPreset);
}
