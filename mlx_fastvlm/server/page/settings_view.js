/** Shows the settings, and what the server's models allow of them. */

import { byId, element } from "./dom.js";
import { AUTO } from "./settings.js";

const PIXELS_A_TOKEN = 64; // a side
const RESOLUTIONS = [256, 384, 512, 640, 768, 1024, 1280, 1536, 2048];
const FITS = { pad: "Whole picture on a square", native: "Whole picture, no empty bars", crop: "Central square only" };
const NO_FACTS = { max_tokens: 1024, max_images: 1 }; // until the server has told

/** Binds `Settings` to the controls, and answers what is to be asked of the server. */
export class SettingsView {
  #settings;
  #cards = [];

  constructor(settings) {
    this.#settings = settings;
    bindChoice(settings, "model", byId("model"), String);
    bindChoice(settings, "resolution", byId("resolution"), Number);
    bindChoice(settings, "fit", byId("fit"), String);
    bindNumber(settings, "maxTokens", byId("max-tokens"));
    bindNumber(settings, "temperature", byId("temperature"));
    bindSwitch(settings, "askAtOnce", byId("ask-at-once"));
    bindSwitch(settings, "keepHistory", byId("keep-history"));
    bindSwitch(settings, "shortcuts", byId("use-shortcuts"));
    bindRadios(settings, "mode", byId("modes"));
    bindRadios(settings, "several", byId("several"));
    settings.follow("model", () => this.#showModel());
  }

  /** What the server tells of the model: `resolution`, in which it was trained, `max_tokens` and others. */
  get facts() {
    return this.#card?.mlx_fastvlm ?? NO_FACTS;
  }

  get model() {
    return this.#card?.id;
  }

  /** What the model is to see of a picture: see pictures.js. */
  get view() {
    const isAuto = this.#resolution === AUTO;
    return {
      resolution: isAuto ? "auto" : this.#resolution,
      largest: isAuto ? this.facts.resolution : this.#resolution,
      fit: this.#settings.get("fit") || this.facts.default_fit,
    };
  }

  get maxTokens() {
    return Math.min(this.#settings.get("maxTokens"), this.facts.max_tokens);
  }

  /** The server's models have become known. */
  offer(cards) {
    this.#cards = cards;
    byId("model").replaceChildren(...cards.map(({ id }) => element("option", { value: id }, id)));
    this.#showModel();
  }

  get #card() {
    return this.#cards.find(({ id }) => id === this.#settings.get("model")) ?? this.#cards[0];
  }

  get #resolution() {
    const chosen = this.#settings.get("resolution");
    return this.#resolutions.includes(chosen) ? chosen : this.#defaultResolution;
  }

  get #defaultResolution() {
    return this.facts.default_resolution === "auto" ? AUTO : this.facts.default_resolution;
  }

  get #resolutions() {
    const { min_resolution: least, max_resolution: most, resolution_step: step } = this.facts;
    const possible = RESOLUTIONS.filter((side) => least <= side && side <= most && side % step === 0);
    const named = [this.facts.resolution, this.#defaultResolution];
    return [...new Set([AUTO, ...possible, ...named])].sort((one, other) => one - other);
  }

  #showModel() {
    if (this.#cards.length === 0) return;
    byId("model").value = this.model;
    byId("max-tokens").max = this.facts.max_tokens;
    byId("max-tokens").value = this.maxTokens;
    byId("max-images").textContent = this.facts.max_images;
    byId("resolution").replaceChildren(...this.#resolutions.map((side) => this.#resolutionChoice(side)));
    byId("resolution").value = this.#resolution;
    byId("fit").replaceChildren(...Object.keys(FITS).map((fit) => this.#fitChoice(fit)));
    byId("fit").value = this.view.fit;
  }

  #resolutionChoice(side) {
    if (side === AUTO) return element("option", { value: side }, "auto: as the picture's detail needs it");
    const tokens = (side / PIXELS_A_TOKEN) ** 2;
    const trained = side === this.facts.resolution ? ", as trained" : "";
    return element("option", { value: side }, `${side} px, ${tokens.toLocaleString("en")} tokens${trained}`);
  }

  #fitChoice(fit) {
    return element("option", { value: fit }, FITS[fit] + (fit === this.facts.fit ? ", as trained" : ""));
  }
}

function bindChoice(settings, name, select, type) {
  select.onchange = () => settings.set(name, type(select.value));
}

/** A number field; what is not a number in its range is put right when the field is left. */
function bindNumber(settings, name, input) {
  settings.follow(name, (value) => (input.value = value));
  input.onchange = () => {
    const value = Math.min(Number(input.max), Math.max(Number(input.min), Number(input.value)));
    settings.set(name, input.step === "1" ? Math.round(value) : value);
    input.value = settings.get(name);
  };
}

function bindSwitch(settings, name, input) {
  settings.follow(name, (value) => (input.checked = value));
  input.onchange = () => settings.set(name, input.checked);
}

function bindRadios(settings, name, group) {
  group.addEventListener("change", ({ target }) => settings.set(name, target.value));
  settings.follow(name, (value) => {
    for (const input of group.querySelectorAll("input")) input.checked = input.value === value;
  });
}
