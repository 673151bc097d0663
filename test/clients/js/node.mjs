// What Node needs so that matrix-js-sdk runs on it and leaves standard output alone. To be imported first.

import { webcrypto } from "node:crypto";

// matrix-js-sdk asks for Node 22. This is what it uses here and older ones do not have, down to Node 18, Debian 12's.
globalThis.crypto ??= webcrypto;
Promise.withResolvers ??= function () {
  const resolvers = {};
  resolvers.promise = new this((resolve, reject) => Object.assign(resolvers, { resolve, reject }));
  return resolvers;
};

// The SDK's log goes to standard error: standard output is for what the test reads.
console.log = console.info = console.debug = console.trace = console.error;
