//go:build race

package integration

// raceFlags build the server as the tests are built.
var raceFlags = []string{"-race"}
