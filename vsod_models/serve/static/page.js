import { byId, json } from "./server.js";
import { startTry } from "./try.js";

const about = await json("/api/about");
startTry(about);

if (about.labels) {
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
