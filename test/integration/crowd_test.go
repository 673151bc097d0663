//go:build all

package integration

import "testing"

// These tests repeat tests of each database with more events.

func TestManyReplacedAtExpiry(t *testing.T) {
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		alice, bob := s.newUser(t), s.newUser(t)
		testReplacedAtExpiry(t, s, alice, bob, s.room(t, alice, bob), 48)
	})
}

func TestManyEndWhileTheSenderLeaves(t *testing.T) { testEndWhileTheSenderLeaves(t, 30) }
