/** Typing `<` in a prompt offers the words of the concepts in ComfyUI's folders.
 *
 * The text box stays ComfyUI's: a list beside it, and only while the list is open the keys that
 * choose from it.
 */

import * as concepts from "./concepts.js";
import { element } from "./dom.js";
import { t } from "./words.js";

const MOST = 8;
const BEGUN = /<[^<>\s]*$/;

/** The words that begin as the text before the caret does; none where no word is begun. */
export function offers(prompts, before) {
  const [begun] = before.match(BEGUN) ?? [];
  if (!begun) return [];
  const fitting = prompts.filter((prompt) => prompt.toLowerCase().startsWith(begun.toLowerCase()));
  return [...new Set(fitting)].slice(0, MOST);
}

/** The text with the begun word replaced, and where the caret is then. */
export function completed(text, caret, chosen) {
  const before = text.slice(0, caret).replace(BEGUN, chosen);
  return { text: before + text.slice(caret), caret: before.length };
}

class Offer {
  /** Begins to look at what is typed anywhere in the page. */
  register() {
    this.element = element("ul", "cd-offer");
    this.element.id = "cd-offer";
    this.element.setAttribute("role", "listbox");
    this.element.setAttribute("aria-label", t("offer"));
    this.element.hidden = true;
    document.body.append(this.element);
    // On the way down: the list is asked before the canvas and its shortcuts.
    document.addEventListener("input", ({ target }) => this.#type(target), true);
    document.addEventListener("keydown", (event) => this.#press(event), true);
    document.addEventListener("focusout", () => this.close(), true);
    document.addEventListener("wheel", () => this.close(), true);
  }

  async #type(box) {
    if (box.tagName !== "TEXTAREA" || box.closest(".cd-node")) return;
    const before = () => box.value.slice(0, box.selectionStart);
    if (!BEGUN.test(before())) return this.close();
    // Asked when a word is begun, so that a concept that was just taught is there.
    if (!this.known || before().endsWith("<")) this.known = (await concepts.list()).concepts;
    const words = offers(this.known.flatMap((concept) => concept.prompts), before());
    if (!words.length || document.activeElement !== box) return this.close();
    this.#open(box, words);
  }

  #open(box, words) {
    this.box = box;
    this.element.replaceChildren(...words.map((word, index) => this.#item(word, index)));
    const { left, bottom, width } = box.getBoundingClientRect();
    Object.assign(this.element.style, { left: `${left}px`, top: `${bottom}px`, minWidth: `${width / 2}px` });
    this.element.hidden = false;
    this.#choose(0);
  }

  #item(word, index) {
    const item = element("li", "", word);
    item.id = `cd-offer-${index}`;
    item.setAttribute("role", "option");
    item.addEventListener("pointerdown", (event) => {
      event.preventDefault(); // the text box keeps the focus
      this.#take(word);
    });
    return item;
  }

  #choose(index) {
    const items = [...this.element.children];
    this.chosen = (index + items.length) % items.length;
    items.forEach((item, at) => item.setAttribute("aria-selected", at === this.chosen));
    this.box.setAttribute("aria-activedescendant", items[this.chosen].id);
  }

  #press(event) {
    if (this.element.hidden || event.target !== this.box) return;
    const act = {
      ArrowDown: () => this.#choose(this.chosen + 1),
      ArrowUp: () => this.#choose(this.chosen - 1),
      Enter: () => this.#take(this.element.children[this.chosen].textContent),
      Tab: () => this.#take(this.element.children[this.chosen].textContent),
      Escape: () => this.close(),
    }[event.key];
    if (!act || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    act();
  }

  #take(word) {
    const { box } = this;
    const { text, caret } = completed(box.value, box.selectionStart, word);
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
