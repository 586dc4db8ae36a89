// Turns each "Question." of a page into a form. On the page stand a paragraph, a list of
// options (none if a number is asked for) and a fold with one answer an option, or one a
// range of numbers; CONTRIBUTING.md has the format. The nodes are moved, not copied, so
// that it does not matter whether MathJax comes before or after. Where something is not
// as expected, the plain text stays.
(() => {
  const NUMBER = /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i;
  const KEY = /^(?:(\S+?)(?: to (\S+))?: )?(yes|no)\.$/i;

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function numberIn(text) {
    const plain = text.trim().replace(/[\u2212\u2013]/g, "-").replace(",", ".");
    const [whole, part = "1", ...more] = plain.split("/");
    const fits = !more.length && NUMBER.test(whole) && NUMBER.test(part);
    return fits && Number(part) ? Number(whole) / Number(part) : NaN;
  }

  // 1,234 may be a thousand or a little more than one
  function problemWith(text) {
    if (!text.trim()) return "Type a number first.";
    if (/^\D?[1-9]\d{0,2},\d{3}$/.test(text.trim()))
      return "Is the comma a decimal point? Write 1234 or 1.234.";
    if (Number.isNaN(numberIn(text)))
      return "This is not a number. Write it like 12, -0.5, 2/3 or 1e-3.";
    return "";
  }

  // what an answer begins with: "Yes.", "No.", "3: yes.", "43 to 45: yes." or "Else: no."
  function readAnswer(item) {
    const key = item.querySelector("em");
    const match = KEY.exec(key?.textContent ?? "");
    if (!match) return null;
    const [, from, to = from, verdict] = match;
    const low = from === "Else" ? -Infinity : numberIn(from ?? "");
    const high = from === "Else" ? Infinity : numberIn(to ?? "");
    return { item, key, low, high, right: verdict.toLowerCase() === "yes" };
  }

  function parts(paragraph) {
    const after = paragraph.nextElementSibling;
    const options = after?.matches("ul") ? after : null;
    const fold = options ? options.nextElementSibling : after;
    if (!fold?.matches("details")) return null;
    const list = fold.querySelector(":scope > ul");
    const answers = [...(list?.children ?? [])].map(readAnswer);
    const fits = !options || options.children.length === answers.length;
    if (!answers.length || answers.includes(null) || !fits) return null;
    return { paragraph, options, fold, list, answers };
  }

  function radios(options) {
    const labels = [...options.children].map((item, i) => {
      const button = element("input", { type: "radio", name: "option", value: i });
      const from = item.querySelector(":scope > p") ?? item;
      return element("label", {}, button, element("span", {}, ...from.childNodes));
    });
    return element("div", { className: "options" }, ...labels);
  }

  function numberField() {
    const field = element("input", { type: "text", name: "number", autocomplete: "off" });
    field.inputMode = "decimal";
    return element("label", { className: "number" }, "Your number", field);
  }

  // Before the answer's own first word, which only paper shows
  function addVerdict({ item, key, right }) {
    const sign = element("span", {}, right ? "✓" : "✗");
    sign.setAttribute("aria-hidden", "true");
    const words = right ? " Right. " : " Wrong. ";
    key.before(element("strong", { className: "verdict" }, sign, words));
    key.classList.add("key");
    item.classList.add(right ? "right" : "wrong");
  }

  function choose(form, answers) {
    const field = form.elements.number;
    if (!field) {
      const chosen = form.querySelector("input:checked");
      if (chosen) return { answer: answers[chosen.value] };
      return { problem: "Choose one of the options first.", at: form.querySelector("input") };
    }
    const problem = problemWith(field.value);
    if (problem) return { problem, at: field };
    const value = numberIn(field.value);
    return { answer: answers.find(({ low, high }) => low <= value && value <= high) };
  }

  function listen(form, answers, hint) {
    function show({ answer, problem = "", at }) {
      for (const { item } of answers) item.hidden = item !== answer?.item;
      hint.textContent = problem;
      form.elements.number?.setAttribute("aria-invalid", String(Boolean(problem)));
      at?.focus();
      // book_site.js then looks for formulas that scroll
      form.dispatchEvent(new Event("toggle"));
    }
    show({});
    form.addEventListener("input", () => show({}));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      show(choose(form, answers));
    });
  }

  function build({ paragraph, options, fold, list, answers }) {
    const legend = element("legend");
    const fields = options ? radios(options) : numberField();
    const check = element("button", { type: "submit" }, "Check");
    const hint = element("p", { className: "hint" });
    const said = element("div", {}, hint);
    said.setAttribute("role", "status");
    const form = element("form", { className: "question", noValidate: true });
    form.append(element("fieldset", {}, legend, fields, check, said));
    paragraph.before(form);
    legend.append(...paragraph.childNodes);
    said.append(list);
    for (const old of [paragraph, options, fold]) old?.remove();
    answers.forEach(addVerdict);
    listen(form, answers, hint);
  }

  function start() {
    const bold = document.querySelectorAll("p > strong:first-child");
    const begins = [...bold].filter((words) => words.textContent === "Question.");
    const found = begins.map((words) => parts(words.parentElement)).filter(Boolean);
    for (const question of found) build(question);
  }

  if (document.readyState === "loading") addEventListener("DOMContentLoaded", start);
  else start();
})();
