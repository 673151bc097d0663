//go:build all

package integration

import "testing"

// What is tested for each database with a few, tested with many.

func TestManyReplacedAtExpiry(t *testing.T) {
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		alice, bob := s.newUser(t), s.newUser(t)
		testReplacedAtExpiry(t, s, alice, bob, s.room(t, alice, bob), 48)
	})
}

func TestManyEndWhileTheSenderLeaves(t *testing.T) { testEndWhileTheSenderLeaves(t, 30) }
