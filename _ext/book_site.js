// A formula that scrolls inside its own box must be within reach of the keyboard.
function markScrollingFormulas() {
  for (const box of document.querySelectorAll("div.math mjx-container, span.math")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}
addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  await document.fonts.ready;
  markScrollingFormulas();
  addEventListener("resize", markScrollingFormulas);
  document.addEventListener("toggle", markScrollingFormulas, true);
});
