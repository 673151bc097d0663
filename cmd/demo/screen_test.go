package main

import (
	"sync"
	"testing"
)

// A scene may begin while a participant still speaks. The race detector sees whether they share the clock safely.
func TestRestartWhileSomebodySpeaks(t *testing.T) {
	var s screen
	var speakers sync.WaitGroup
	speakers.Go(func() { s.say("Alice", "hello") })
	s.restart()
	speakers.Wait()
}
