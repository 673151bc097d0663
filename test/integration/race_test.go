//go:build race

package integration

// raceFlags build the server with the race detector, like the tests.
var raceFlags = []string{"-race"}
