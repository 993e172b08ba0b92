/** What the user has chosen, remembered in this browser. Knows no elements; settings_view.js shows it. */

import * as stored from "./stored.js";

const NAME = "mlx-fastvlm.settings";

/** A resolution: as each picture's detail needs it. */
export const AUTO = -1;

const DEFAULTS = Object.freeze({
  model: "", // "": the server's first
  resolution: 0, // pixels a side; 0: the server's choice for the model; or AUTO
  fit: "", // how a picture comes to that square: "pad", "crop" or "native"; "": the server's choice
  maxTokens: 240,
  temperature: 0,
  mode: "continuous", // or "single"
  cameraId: "", // "": the browser's choice
  mirror: "auto", // "auto": cameras that face the user; or "on", "off"
  gate: 4, // percent that a frame must differ from the last answered one
  several: "each", // pictures: one after another; or "together" in one question
  askAtOnce: true, // as soon as pictures arrive
  keepHistory: false, // over reloads
  theme: "auto", // or "light", "dark"
  shortcuts: true,
  preset: "describe",
});

/** Named values; a "change" event, whose detail is the name, follows each change. */
export class Settings extends EventTarget {
  #values;

  constructor() {
    super();
    this.#values = { ...DEFAULTS, ...ofKnownKind(stored.read(NAME)) };
  }

  get(name) {
    return this.#values[name];
  }

  set(name, value) {
    if (this.#values[name] === value) return;
    this.#values[name] = value;
    stored.write(NAME, this.#values);
    this.dispatchEvent(new CustomEvent("change", { detail: name }));
  }

  /** Call with a setting's value, now and whenever it changes. */
  follow(name, use) {
    use(this.get(name));
    this.addEventListener("change", ({ detail }) => detail === name && use(this.get(name)));
  }
}

/** Of what was stored, perhaps by an older version of the page: the names we know, with values of the right type. */
function ofKnownKind(values) {
  const pairs = Object.entries(values ?? {});
  return Object.fromEntries(pairs.filter(([name, value]) => typeof value === typeof DEFAULTS[name]));
}
