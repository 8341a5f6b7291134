import { byId, json } from "./server.js";
import { startTry } from "./try.js";

const asked = json("/api/about");
startTry(asked); // what is dropped before the answer waits for it

if ((await asked).labels) {
  const { startCorrect } = await import("./correct.js");
  const show = () => {
    const page = location.hash === "#/try" ? "try" : "correct";
    for (const name of ["try", "correct"]) {
      byId(name).hidden = name !== page;
      const tab = document.querySelector(`nav a[href="#/${name}"]`);
      if (name === page) tab.setAttribute("aria-current", "page");
      else tab.removeAttribute("aria-current");
    }
  };
  byId("tabs").hidden = false;
  addEventListener("hashchange", show);
  show();
  startCorrect();
}
