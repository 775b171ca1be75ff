/** Pictures by hand: dropped on Custom Diffusion Concept or chosen there, they go into a folder of
 * ComfyUI's input that is named after the class noun, and the node takes that folder.
 */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { actionButton, element, showOnNode } from "./dom.js";
import { t } from "./words.js";

const CONCEPT = "CustomDiffusionConcept";
const FOLDER = "custom_diffusion_folder"; // a property of the node: the folder that it has filled
const HEIGHT = 60;
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
    const button = actionButton(t("choosePictures"), t("choosePicturesHint"), "pi-images", choose, complain);
    this.said = element("p", "cd-taught");
    this.said.setAttribute("role", "status");
    this.strip = element("div", "cd-samples");
    this.element = element(
      "div", "cd-pictures", element("div", "cd-buttons", button), this.said, this.strip, this.chooser,
    );
    showOnNode(node, "pictures", this.element, HEIGHT);
  }

  /** Uploads, and tells of it; a failure keeps what was uploaded. */
  async take(files) {
    const wanted = files.filter((file) => file.type.startsWith("image/") || TAKEN.test(file.name));
    const folder = this.#folder();
    let done = 0;
    try {
      await Promise.all(
        wanted.map(async (file) => {
          const name = await send(file, folder);
          this.said.textContent = t("uploading", { done: ++done, count: wanted.length });
          if (!TAKEN.test(file.name)) this.strip.append(thumbnail(folder, name));
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
    if (wanted.length) await this.#choose(folder);
  }

  /** The folder that this node has filled before and still has, or a new one. */
  #folder() {
    const { folder, taken } = this.#state();
    if (folder.value === this.node.properties[FOLDER]) return folder.value;
    this.strip.replaceChildren();
    const noun = this.node.widgets.find((each) => each.name === "class_noun").value;
    const name = noun.replace(/[^\p{L}\p{N} _-]/gu, "").trim() || "pictures";
    let free = name;
    for (let number = 2; taken.has(free); number++) free = `${name}-${number}`;
    return free;
  }

  async #choose(name) {
    await app.refreshComboInNodes(); // so that the folder is among the choices
    const { folder } = this.#state();
    this.node.properties[FOLDER] = name;
    folder.value = name;
    folder.callback?.(name);
    this.node.setDirtyCanvas(true, true);
  }

  #state() {
    const folder = this.node.widgets.find((each) => each.name === "folder");
    return { folder, taken: new Set(folder.options.values) };
  }
}

function complain(error) {
  app.extensionManager.toast.add({ severity: "error", summary: error.message });
}

/** Uploads a file; returns its name there, which is another where the name was taken. */
async function send(file, folder) {
  const body = new FormData();
  body.append("image", file);
  body.append("subfolder", folder);
  body.append("type", "input");
  const answer = await api.fetchApi("/upload/image", { method: "POST", body });
  if (!answer.ok) throw new Error(t("uploadFailed", { name: file.name, status: answer.status }));
  return (await answer.json()).name;
}

function thumbnail(folder, name) {
  const where = new URLSearchParams({ filename: name, subfolder: folder, type: "input", preview: "webp;60" });
  const picture = element("img");
  picture.src = api.apiURL(`/view?${where}`);
  picture.alt = name;
  picture.title = name;
  picture.loading = "lazy";
  return element("span", "cd-sample", picture);
}
