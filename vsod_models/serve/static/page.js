import { json } from "./server.js";
import { startTry } from "./try.js";

startTry(await json("/api/about"));
