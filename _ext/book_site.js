// A formula that scrolls inside its own box must be within reach of the keyboard.
function markScrollingFormulas() {
  for (const box of document.querySelectorAll(".math")) {
    // single letters lean out of their box by a pixel or two
    if (box.scrollWidth > box.clientWidth + 4) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}
addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  // fonts that arrive late, folds and windows: all of them change a size
  const sizes = new ResizeObserver(markScrollingFormulas);
  for (const box of document.querySelectorAll(".math, mjx-math")) sizes.observe(box);
});
// Paper is white and cannot be unfolded: while a page prints, every fold stands open
// and its colours are the light ones.
let screen = { folds: [] };
matchMedia("print").addEventListener("change", ({ matches: printing }) => {
  const page = document.documentElement;
  if (printing) {
    const folds = [...document.querySelectorAll("details:not([open])")];
    screen = { folds, theme: page.dataset.theme };
  }
  for (const fold of screen.folds) fold.open = printing;
  page.dataset.theme = printing ? "light" : screen.theme;
});
// Results of a search show the words around the one sought, where a formula's source
// would be no help.
addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return;
  const { htmlToText } = Search;
  const formula = /<(span|div) class="math[^>]*>[^<]*<\/\1>/g;
  Search.htmlToText = (page, anchor) => htmlToText(page.replace(formula, "…"), anchor);
});
