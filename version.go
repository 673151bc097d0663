package msc4140

// Version is the version of this module, named as in CHANGELOG.md. Between two releases it is the next version with the suffix "-dev".
const Version = "1.0.0-dev"
