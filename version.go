package msc4140

// Version is the version of this module, named as in CHANGELOG.md. Between two releases it is the next one, with "-dev"
// behind it.
const Version = "1.0.0-dev"
