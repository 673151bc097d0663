// Lets matrix-js-sdk run on Node and keeps its log off standard output. Import this module first.

import { webcrypto } from "node:crypto";

// matrix-js-sdk requires Node 22. These are the functions that the SDK uses and Node 18, Debian 12's version, lacks.
globalThis.crypto ??= webcrypto;
Promise.withResolvers ??= function () {
  const resolvers = {};
  resolvers.promise = new this((resolve, reject) => Object.assign(resolvers, { resolve, reject }));
  return resolvers;
};

// The SDK's log goes to standard error, because the test reads standard output.
console.log = console.info = console.debug = console.trace = console.error;
