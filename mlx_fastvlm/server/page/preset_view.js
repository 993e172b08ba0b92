/** Shows the presets: one is chosen by its name, and its prompt and suffix are edited in place. */

import { byId, element } from "./dom.js";

/** Binds `Presets` to the form for them. */
export class PresetView {
  #presets;
  #choices = byId("presets");
  #fields = { name: byId("preset-name"), prompt: byId("prompt"), suffix: byId("suffix") };

  constructor(presets) {
    this.#presets = presets;
    for (const [field, input] of Object.entries(this.#fields)) {
      input.addEventListener("input", () => presets.edit(field, input.value));
    }
    byId("preset-add").onclick = () => {
      presets.add();
      this.#fields.name.select();
    };
    byId("preset-remove").onclick = () => presets.remove();
    byId("preset-reset").onclick = () => presets.reset();
    this.#choices.addEventListener("change", ({ target }) => presets.choose(target.value));
    for (const event of ["choose", "edit"]) presets.addEventListener(event, () => this.#show());
    this.#show();
  }

  #show() {
    const { list, chosen } = this.#presets;
    if (!this.#isShown(list)) this.#choices.replaceChildren(...list.map(choice));
    for (const input of this.#choices.querySelectorAll("input")) input.checked = input.value === chosen.id;
    for (const [field, input] of Object.entries(this.#fields)) {
      if (input.value !== chosen[field]) input.value = chosen[field];
    }
    byId("preset-remove").disabled = list.length === 1;
  }

  /** Whether the choices are those already; new ones would take the focus from the one that has it. */
  #isShown(list) {
    const shown = [...this.#choices.children].map((label) => `${label.firstChild.value} ${label.textContent}`);
    return JSON.stringify(shown) === JSON.stringify(list.map(({ id, name }) => `${id} ${label(name)}`));
  }
}

function choice({ id, name }) {
  const input = element("input", { type: "radio", name: "preset", value: id });
  return element("label", { className: "chip" }, input, element("span", {}, label(name)));
}

function label(name) {
  return name.trim() || "Without a name";
}
