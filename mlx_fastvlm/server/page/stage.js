/** The large picture: the camera's, or the user's files with a strip of them; and the ways by which files come in. */

import { byId, element, icon } from "./dom.js";
import { pictureOf, picturesIn } from "./pictures.js";

/** Knows what is shown: "nothing", "live" (a video) or "pictures". */
export class Stage {
  #onPictures;
  #onOther;
  #pictures = [];
  #taken = 0; // how often pictures were brought

  /**
   * @param onPictures called when the user has brought pictures, which are shown by then.
   * @param onOther called when the user has dropped something else.
   */
  constructor(onPictures, onOther) {
    this.#onPictures = onPictures;
    this.#onOther = onOther;
    this.#acceptDrops(document.body);
    this.#acceptPastes();
    const input = byId("files");
    input.onchange = async () => {
      await this.#take([...input.files]);
      input.value = ""; // so that the same file can be chosen again
    };
  }

  shows = "nothing";

  get pictures() {
    return this.#pictures;
  }

  showLive() {
    this.#forgetPictures();
    this.#enter("live");
  }

  showNothing() {
    this.#forgetPictures();
    this.#enter("nothing");
  }

  /** Show one of the pictures large. */
  show(index) {
    const { preview, name } = this.#pictures[index];
    const image = byId("picture");
    image.hidden = preview === null;
    if (preview) image.src = preview;
    image.alt = name;
    byId("no-preview").hidden = preview !== null;
    byId("no-preview-name").textContent = name;
    for (const [at, button] of [...byId("strip").querySelectorAll("button")].entries()) {
      button.setAttribute("aria-pressed", String(at === index));
    }
  }

  #enter(shows) {
    this.shows = shows;
    document.body.dataset.shows = shows;
  }

  #forgetPictures() {
    forget(this.#pictures);
    this.#pictures = [];
  }

  async #take(files) {
    if (files.length === 0) return;
    const taken = (this.#taken += 1);
    const pictures = await Promise.all(files.map(pictureOf));
    if (taken !== this.#taken) {
      forget(pictures); // others that were brought later are there already, or will be
      return;
    }
    this.#forgetPictures();
    this.#pictures = pictures;
    document.body.dataset.several = String(pictures.length > 1);
    byId("strip").replaceChildren(...pictures.map((picture, index) => this.#stripItem(picture, index)));
    this.show(0);
    this.#enter("pictures");
    this.#onPictures();
  }

  #stripItem({ thumbnail, name }, index) {
    const substitute = () => element("span", {}, icon("picture"), name);
    const shown = thumbnail ? element("img", { src: thumbnail, alt: name }) : substitute();
    const button = element("button", { type: "button", title: name, onclick: () => this.show(index) }, shown);
    return element("li", {}, button);
  }

  #acceptPastes() {
    document.addEventListener("paste", (event) => {
      const files = picturesIn(event.clipboardData);
      const isText = event.target.closest("textarea, input") && event.clipboardData.types.includes("text/plain");
      if (files.length === 0 || isText) return;
      event.preventDefault();
      this.#take(files);
    });
  }

  #acceptDrops(target) {
    let depth = 0; // enter and leave events come for every element below
    const mark = (change) => {
      depth = change === 0 ? 0 : depth + change;
      target.dataset.dropping = String(depth > 0);
    };
    const hasFiles = ({ dataTransfer }) => dataTransfer.types.includes("Files");
    target.addEventListener("dragenter", (event) => hasFiles(event) && mark(1));
    target.addEventListener("dragleave", (event) => hasFiles(event) && mark(-1));
    target.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
    target.addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault(); // else the browser would leave the page for the file
      mark(0);
      const files = picturesIn(event.dataTransfer);
      if (files.length) this.#take(files);
      else this.#onOther();
    });
  }
}

function forget(pictures) {
  for (const { preview } of pictures) if (preview) URL.revokeObjectURL(preview);
}
