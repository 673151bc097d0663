//go:build all

package integration

// leftOut says what is not tested without the build tag all.
const leftOut = ""
