//go:build all

package integration

// leftOut says which tests are left out without the build tag all.
const leftOut = ""
