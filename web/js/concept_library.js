/** The saved concepts below the jobs, and other tools' files: found by name, word or base model, sorted,
 * put on the canvas, renamed, put into the bin. */

import { CHOICE, conceptParts, LOAD } from "./concept_card.js";
import * as concepts from "./concepts.js";
import { actionButton, element } from "./dom.js";
import { allNodes } from "./nodes.js";
import { t } from "./words.js";

const SORTS = ["date", "name", "base", "size"];
const MOST = 50; // a search finds the others
const TYPING_MS = 200;

export class ConceptLibrary {
  /**
   * @param {{onError: function(Error): void, addToGraph: function(string): Promise<void>,
   *          askName: function(object): Promise<string|null>,
   *          confirmBin: function(object): Promise<boolean>}} host
   */
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

  async #rename(concept) {
    const to = await this.host.askName(concept);
    if (!to) return;
    const { name } = await concepts.rename(concept.name, to);
    await concepts.refreshChoices();
    chooseRenamed(concept.name, name);
    await this.refresh();
  }

  async #bin(concept) {
    if (!(await this.host.confirmBin(concept))) return;
    const { bin } = await concepts.remove(concept.name);
    await this.refresh();
    this.told.textContent = t("binned", { name: concept.name, bin });
    await concepts.refreshChoices();
  }

  #item(concept) {
    const parts = conceptParts(concept);
    const facts = parts.at(-1);
    const name = element("span", "cd-name", concept.name);
    name.title = concept.name;
    facts.prepend(name);
    const saved = new Date(concept.created);
    if (!Number.isNaN(saved.valueOf())) facts.append(element("p", "cd-taught", saved.toLocaleDateString()));
    const button = (verb, icon, act) => actionButton(t(verb), t(`${verb}Hint`), icon, act, this.host.onError);
    facts.append(
      element(
        "div", "cd-buttons",
        button("use", "pi-plus", () => this.host.addToGraph(concept.name)),
        button("rename", "pi-pencil", () => this.#rename(concept)),
        button("bin", "pi-trash", () => this.#bin(concept)),
      ),
    );
    if (!concept.thumbnail) parts.unshift(noPicture());
    const item = element("li", "cd-concept", ...parts);
    item.dataset.name = concept.name;
    return item;
  }
}

/** Where a concept has no picture, so that all take the same room. */
function noPicture() {
  const sign = element("i", "pi pi-image");
  sign.setAttribute("aria-hidden", "true");
  return element("div", "cd-nopicture", sign);
}

/** Nodes of the open workflow that load the file go on to do so. */
function chooseRenamed(before, now) {
  for (const node of allNodes().filter(({ comfyClass }) => comfyClass === LOAD)) {
    const choice = node.widgets.find((widget) => widget.name === CHOICE);
    if (choice?.value !== before) continue;
    choice.value = now;
    choice.callback?.(now);
  }
}
