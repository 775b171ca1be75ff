/** Typing `<` in a prompt offers the words of the concepts in ComfyUI's folders.
 *
 * The text box stays ComfyUI's: a list beside it, and only while the list is open the keys that
 * choose from it.
 */

import { app } from "../../../scripts/app.js";
import * as concepts from "./concepts.js";
import { element } from "./dom.js";
import { allNodes } from "./nodes.js";
import { t } from "./words.js";

const BEGUN = /<[^<>\s]*$/;

/**
 * The words that begin as the text before the caret does, and where each is from; none where no word
 * is begun.
 * @param {{name: string, family: string, prompts: string[]}[]} known
 * @returns {{word: string, sources: string[]}[]}
 */
export function offers(known, before) {
  const [begun] = before.match(BEGUN) ?? [];
  if (!begun) return [];
  const sources = new Map();
  for (const { name, family, prompts } of known) {
    for (const word of prompts) {
      if (!word.toLowerCase().startsWith(begun.toLowerCase())) continue;
      const source = [name, family].filter(Boolean).join(" · ");
      sources.set(word, [...new Set([...(sources.get(word) ?? []), source])]);
    }
  }
  return [...sources].map(([word, from]) => ({ word, sources: from }));
}

/** The text with the begun word replaced, and where the caret is then. */
export function completed(text, caret, chosen) {
  const before = text.slice(0, caret).replace(BEGUN, chosen);
  return { text: before + text.slice(caret), caret: before.length };
}

/** Whether a text box is where a node takes a text: not a note, which is the page's alone. */
function isPrompt(box) {
  if (box.tagName !== "TEXTAREA" || box.readOnly || box.closest(".cd-node")) return false;
  const id = box.closest("[data-node-id]")?.dataset.nodeId; // Nodes 2.0
  const node = id
    ? app.canvas.graph.getNodeById(id)
    : allNodes().find((each) => each.widgets?.some((widget) => widget.element === box));
  return Boolean(node && (!node.isVirtualNode || node.subgraph));
}

class Offer {
  /** Begins to look at what is typed anywhere in the page. */
  register() {
    this.element = element("ul", "cd-offer");
    this.element.id = "cd-offer";
    this.element.setAttribute("role", "listbox");
    this.element.setAttribute("aria-label", t("offer"));
    this.element.hidden = true;
    this.element.addEventListener("mousedown", (event) => {
      event.preventDefault(); // the text box keeps the focus
      event.stopPropagation(); // ComfyUI takes it away where anything else is pressed
    });
    document.body.append(this.element);
    // On the way down: the list is asked before the canvas and its shortcuts.
    document.addEventListener("input", ({ target }) => this.#type(target), true);
    document.addEventListener("keydown", (event) => this.#press(event), true);
    document.addEventListener("focusout", () => this.close(), true);
    document.addEventListener("wheel", ({ target }) => this.element.contains(target) || this.close(), true);
  }

  async #type(box) {
    if (!isPrompt(box)) return;
    const before = () => box.value.slice(0, box.selectionStart);
    if (!BEGUN.test(before())) return this.close();
    // Asked when a word is begun, so that a concept that was just taught is there. What is typed until
    // the answer comes waits for the same one: a later answer would draw the list, and choose, again.
    if (!this.asked || before().endsWith("<")) this.asked = concepts.list();
    const { concepts: known } = await this.asked;
    const words = offers(known, before());
    if (!words.length || document.activeElement !== box) return this.close();
    this.#open(box, words);
  }

  #open(box, words) {
    this.box = box;
    this.words = words;
    this.element.replaceChildren(...words.map((word, index) => this.#item(word, index)));
    this.element.hidden = false;
    this.#place(box.getBoundingClientRect());
    this.#choose(0);
  }

  /** Below the text box, or above it where there is no room; within the window. */
  #place({ left, top, bottom, width }) {
    this.element.style.minWidth = `${width / 2}px`;
    const { offsetWidth, offsetHeight } = this.element;
    const below = bottom + offsetHeight <= window.innerHeight;
    const [x, y] = [left, below ? bottom : top - offsetHeight];
    this.element.style.left = `${Math.max(0, Math.min(x, window.innerWidth - offsetWidth))}px`;
    this.element.style.top = `${Math.max(0, Math.min(y, window.innerHeight - offsetHeight))}px`;
  }

  #item({ word, sources }, index) {
    const item = element("li", "", element("span", "", word), element("small", "", sources.join(", ")));
    item.id = `cd-offer-${index}`;
    item.title = sources.join("\n");
    item.setAttribute("role", "option");
    item.addEventListener("click", () => this.#take(index));
    return item;
  }

  #choose(index) {
    const items = [...this.element.children];
    this.chosen = (index + items.length) % items.length;
    items.forEach((item, at) => item.setAttribute("aria-selected", at === this.chosen));
    items[this.chosen].scrollIntoView({ block: "nearest" });
    this.box.setAttribute("aria-activedescendant", items[this.chosen].id);
  }

  #press(event) {
    if (this.element.hidden || event.target !== this.box) return;
    const act = {
      ArrowDown: () => this.#choose(this.chosen + 1),
      ArrowUp: () => this.#choose(this.chosen - 1),
      Enter: () => this.#take(this.chosen),
      Tab: () => this.#take(this.chosen),
      Escape: () => this.close(),
    }[event.key];
    if (!act || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    act();
  }

  #take(index) {
    const { box } = this;
    const { text, caret } = completed(box.value, box.selectionStart, this.words[index].word);
    this.close();
    box.value = text;
    box.setSelectionRange(caret, caret);
    box.dispatchEvent(new Event("input", { bubbles: true })); // ComfyUI hears of it as of typing
  }

  close() {
    this.element.hidden = true;
    this.box?.removeAttribute("aria-activedescendant");
  }
}

export function registerCompletion() {
  new Offer().register();
}
