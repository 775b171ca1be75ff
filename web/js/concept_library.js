/** The saved concepts below the jobs, and other tools' files: found by name, word or base model, sorted,
 * put on the canvas. */

import { conceptParts } from "./concept_card.js";
import * as concepts from "./concepts.js";
import { actionButton, element } from "./dom.js";
import { t } from "./words.js";

const SORTS = ["date", "name", "base", "size"];
const MOST = 50; // a search finds the others
const TYPING_MS = 200;

export class ConceptLibrary {
  /** @param {{onError: function(Error): void, addToGraph: function(string): Promise<void>}} host */
  constructor(host) {
    this.host = host;
    this.search = element("input");
    this.search.type = "search";
    this.search.placeholder = t("librarySearch");
    this.search.setAttribute("aria-label", t("librarySearch"));
    this.search.addEventListener("input", () => {
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.refresh(), TYPING_MS);
    });
    this.base = this.#choice("libraryBase", [new Option(t("allBases"), "")]);
    this.sort = this.#choice("librarySort", SORTS.map((sort) => new Option(t(`${sort}Sort`), sort)));
    this.told = element("p", "cd-taught");
    this.told.setAttribute("role", "status");
    this.listing = element("ul");
    this.unreadableCount = element("summary");
    this.reasons = element("div");
    this.unreadable = element("details", "", this.unreadableCount, this.reasons);
    this.unreadable.hidden = true;
    this.element = element(
      "details", "cd-library",
      element("summary", "cd-name", t("library")),
      element("div", "cd-search", this.search, this.base, this.sort),
      this.told, this.listing, this.unreadable,
    );
    this.element.addEventListener("toggle", () => this.refresh());
  }

  /** Asks for the concepts again, while the list is open. */
  async refresh() {
    if (!this.element.open) return;
    const asked = (this.asked = {});
    try {
      const [search, base, sort] = [this.search, this.base, this.sort].map(({ value }) => value);
      const found = await concepts.list({ search, base, sort });
      if (this.asked === asked) this.#show(found); // else more was typed meanwhile
    } catch (error) {
      this.host.onError(error);
    }
  }

  #choice(label, options) {
    const choice = element("select", "", ...options);
    choice.setAttribute("aria-label", t(label));
    choice.addEventListener("change", () => this.refresh());
    return choice;
  }

  /** Offers the base models that there are files of; one that was chosen stays. */
  #offer(bases) {
    const offered = new Set([...this.base.options].map((option) => option.value));
    const added = Object.entries(bases).filter(([base]) => !offered.has(base));
    this.base.append(...added.map(([base, title]) => new Option(title, base)));
  }

  #show({ concepts: found, unreadable, bases }) {
    this.#offer(bases);
    const shown = found.slice(0, MOST);
    const more = found.length > MOST ? "libraryMore" : "libraryFound";
    const some = this.search.value.trim() || this.base.value;
    const nothing = some ? "libraryNoMatch" : "libraryEmpty";
    this.told.textContent = t(found.length ? more : nothing, { count: found.length, shown: MOST });
    this.listing.replaceChildren(...shown.map((concept) => this.#item(concept)));
    const reasons = Object.values(unreadable);
    this.unreadable.hidden = !reasons.length;
    this.unreadableCount.textContent = t("libraryUnreadable", { count: reasons.length });
    this.reasons.replaceChildren(...reasons.map((why) => element("p", "cd-trouble", why)));
  }

  #item(concept) {
    const parts = conceptParts(concept);
    const facts = parts.at(-1);
    const name = element("span", "cd-name", concept.name);
    name.title = concept.name;
    facts.prepend(name);
    const saved = new Date(concept.created);
    if (!Number.isNaN(saved.valueOf())) facts.append(element("p", "cd-taught", saved.toLocaleDateString()));
    const use = () => this.host.addToGraph(concept.name);
    const button = actionButton(t("use"), t("useHint"), "pi-plus", use, this.host.onError);
    facts.append(element("div", "cd-buttons", button));
    const item = element("li", "cd-concept", ...parts);
    item.dataset.name = concept.name;
    return item;
  }
}
