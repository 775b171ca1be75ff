/** Pictures by hand: dropped on Custom Diffusion Concept or chosen there, they go into a folder of
 * ComfyUI's input that is named after the class noun, and the node takes that folder. The node shows
 * the pictures of its folder, each with a button that takes it out.
 */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { actionButton, after, element, showOnNode } from "./dom.js";
import * as pictures from "./pictures.js";
import { t } from "./words.js";

const CONCEPT = "CustomDiffusionConcept";
const FOLDER = "custom_diffusion_folder"; // a property of the node: the folder that it has filled
const NONE = "none";
const HEIGHT = 60;
const MOST_SHOWN = 60;
const PREVIEWED_MS = 300; // ComfyUI adds what a run shows as the node is drawn next
const TAKEN = /\.(txt|caption)$/i; // beside pictures: their captions

/** To be called for every node of the pack. */
export function offerUpload(node) {
  if (node.comfyClass !== CONCEPT) return;
  const upload = new PictureUpload(node);
  node.onDragOver = (event) => event.dataTransfer?.types.includes("Files") ?? false;
  node.onDragDrop = (event) => {
    const files = [...(event.dataTransfer?.files ?? [])];
    if (files.length) upload.take(files);
    return files.length > 0;
  };
}

class PictureUpload {
  constructor(node) {
    this.node = node;
    this.chooser = element("input");
    this.chooser.type = "file";
    this.chooser.multiple = true;
    this.chooser.accept = "image/*,.txt,.caption";
    this.chooser.hidden = true;
    this.chooser.addEventListener("change", () => this.take([...this.chooser.files]));
    const choose = () => this.chooser.click();
    this.button = actionButton(t("choosePictures"), t("choosePicturesHint"), "pi-images", choose, complain);
    this.said = element("p", "cd-taught");
    this.said.setAttribute("role", "status");
    this.strip = element("ul", "cd-samples");
    this.strip.setAttribute("aria-label", t("pictures"));
    this.element = element(
      "div", "cd-pictures", element("div", "cd-buttons", this.button), this.said, this.strip, this.chooser,
    );
    showOnNode(node, "pictures", this.element, HEIGHT);
    const show = () => this.show();
    after(this.#folder, "callback", show);
    after(node, "onConfigure", show);
    after(node, "onExecuted", () => setTimeout(() => fit(node), PREVIEWED_MS));
    show();
  }

  get #folder() {
    return this.node.widgets.find((each) => each.name === "folder");
  }

  /** Uploads, and tells of it; a failure keeps what was uploaded. */
  async take(files) {
    const wanted = files.filter((file) => file.type.startsWith("image/") || TAKEN.test(file.name));
    const folder = this.#ownFolder();
    let done = 0;
    try {
      await Promise.all(
        wanted.map(async (file) => {
          await send(file, folder);
          this.said.textContent = t("uploading", { done: ++done, count: wanted.length });
        }),
      );
      const left = files.length - wanted.length;
      this.said.textContent = [
        t("uploaded", { count: wanted.length, folder }),
        ...(left ? [t("notUploaded", { count: left })] : []),
      ].join(" ");
    } catch (error) {
      this.said.textContent = error.message;
    }
    this.chooser.value = "";
    if (done) await this.#choose(folder);
  }

  /** The folder that this node has filled before and still has, or a new one. */
  #ownFolder() {
    const { value, options } = this.#folder;
    if (value === this.node.properties[FOLDER]) return value;
    const noun = this.node.widgets.find((each) => each.name === "class_noun").value;
    const name = noun.replace(/[^\p{L}\p{N} _-]/gu, "").trim() || "pictures";
    let free = name;
    for (let number = 2; options.values.includes(free); number++) free = `${name}-${number}`;
    return free;
  }

  async #choose(name) {
    await app.refreshComboInNodes(); // so that the folder is among the choices
    this.node.properties[FOLDER] = name;
    this.#folder.value = name;
    this.#folder.callback?.(name); // shows its pictures
    this.node.setDirtyCanvas(true, true);
  }

  /** The pictures of the chosen folder. */
  async show() {
    const folder = this.#folder.value;
    if (folder !== this.shown) this.strip.replaceChildren();
    this.shown = folder;
    if (!folder || folder === NONE) return;
    try {
      const names = await pictures.list(folder);
      if (folder !== this.shown) return; // another was chosen meanwhile
      const parts = names.slice(0, MOST_SHOWN).map((name) => this.#thumbnail(folder, name));
      const more = names.length - parts.length;
      if (more > 0) parts.push(element("li", "cd-sample", t("morePictures", { count: more })));
      this.strip.replaceChildren(...parts);
    } catch (error) {
      this.strip.replaceChildren();
      this.said.textContent = error.message;
    }
  }

  #thumbnail(folder, name) {
    const picture = element("img");
    picture.src = pictures.thumbnailUrl(folder, name);
    picture.alt = name;
    picture.title = name;
    picture.loading = "lazy";
    const remove = actionButton("", t("removePicture", { name }), "pi-times", () => this.#remove(folder, name), complain);
    remove.className = "cd-remove";
    remove.setAttribute("aria-label", remove.title);
    return element("li", "cd-sample", picture, remove);
  }

  /** Keyboards go on with the picture that comes next. */
  async #remove(folder, name) {
    const { bin } = await pictures.remove(folder, name);
    const buttons = [...this.strip.querySelectorAll("button")];
    const place = buttons.indexOf(document.activeElement);
    await this.show();
    const left = this.strip.querySelectorAll("button");
    if (place >= 0) (left[Math.min(place, left.length - 1)] ?? this.button).focus();
    this.said.textContent = t("removedPicture", { name, bin: `${folder}/${bin}` });
  }
}

/** Else the sheet of a run hangs out of a node that has been smaller. */
function fit(node) {
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas(true, true);
}

function complain(error) {
  app.extensionManager.toast.add({ severity: "error", summary: error.message });
}

async function send(file, folder) {
  const body = new FormData();
  body.append("image", file);
  body.append("subfolder", folder);
  body.append("type", "input");
  const answer = await api.fetchApi("/upload/image", { method: "POST", body });
  if (!answer.ok) throw new Error(t("uploadFailed", { name: file.name, status: answer.status }));
}
