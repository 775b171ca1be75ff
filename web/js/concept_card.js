/** Load Concept shows which concept is chosen: its picture, its words to copy, its base model. */

import * as concepts from "./concepts.js";
import { after, copyButton, element, showOnNode } from "./dom.js";
import { allNodes } from "./nodes.js";
import { t } from "./words.js";

export const LOAD = "LoadConcept";
export const CHOICE = "concept_name";
const HEIGHT = 84;
const shows = new WeakMap(); // node → what fills its card

/** To be called for every node that is made; its choice may come later, with a workflow. */
export function showConcept(node) {
  if (node.comfyClass !== LOAD) return;
  const choice = node.widgets?.find((widget) => widget.name === CHOICE);
  if (!choice) return;
  const card = element("div", "cd-concept");
  showOnNode(node, "concept", card, HEIGHT);
  const show = () => fill(card, choice.value);
  shows.set(node, show);
  after(choice, "callback", show);
  after(node, "onConfigure", show);
  show();
}

/** Other content may be in the files now. */
export function showConceptsAgain() {
  for (const node of allNodes()) shows.get(node)?.();
}

async function fill(card, name) {
  card.dataset.name = name ?? "";
  if (!name) return card.replaceChildren();
  let parts;
  try {
    parts = conceptParts(await concepts.show(name));
  } catch (error) {
    parts = [element("p", "cd-trouble", error.message)];
  }
  if (card.dataset.name === name) card.replaceChildren(...parts); // else another was chosen meanwhile
}

/** The picture of a concept, where it has one, and its facts. */
export function conceptParts(concept) {
  const size = { family: concept.family, size: concept.megabytes || "< 0.01" };
  const lines = [t(concept.family ? "card" : "cardSize", size)];
  if (concept.steps) lines.push(t(concept.resolution ? "cardTraining" : "cardSteps", concept));
  if (concept.other) lines.push(t("otherFile", { kind: t(`${concept.other}Kind`) }));
  const facts = element("div", "cd-facts", ...concept.prompts.map(wordButton));
  facts.append(...lines.map((line) => element("p", "cd-taught", line)));
  if (!concept.thumbnail) return [facts];
  const picture = element("img");
  picture.src = concepts.thumbnailUrl(concept.name);
  picture.alt = concept.name;
  return [picture, facts];
}

const wordButton = (prompt) => copyButton(prompt, t("copy", { prompt }), prompt);
