/** The saved concepts below the jobs: found by name or word, sorted, put on the canvas. */

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
    this.sort = element("select", "", ...SORTS.map((sort) => new Option(t(`${sort}Sort`), sort)));
    this.sort.setAttribute("aria-label", t("librarySort"));
    this.sort.addEventListener("change", () => this.refresh());
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
      element("div", "cd-search", this.search, this.sort),
      this.told, this.listing, this.unreadable,
    );
    this.element.addEventListener("toggle", () => this.refresh());
  }

  /** Asks for the concepts again, while the list is open. */
  async refresh() {
    if (!this.element.open) return;
    const asked = (this.asked = {});
    try {
      const found = await concepts.list({ search: this.search.value, sort: this.sort.value });
      if (this.asked === asked) this.#show(found); // else more was typed meanwhile
    } catch (error) {
      this.host.onError(error);
    }
  }

  #show({ concepts: found, unreadable }) {
    const shown = found.slice(0, MOST);
    const more = found.length > MOST ? "libraryMore" : "libraryFound";
    const nothing = this.search.value.trim() ? "libraryNoMatch" : "libraryEmpty";
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
