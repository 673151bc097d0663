package expiration

import (
	"fmt"
	"time"

	"pgregory.net/rapid"
)

// The random scripts that the model tests play.

// modes are ways to play a script. In a calm one nothing fails, and nothing takes time. In a slow one insertions take time.
var modes = []struct {
	name       string
	calm, slow bool
}{{"Calm", true, false}, {"Slow", true, true}, {"WithFaults", false, false}}

// slowInsert draws how slow insertions are.
func slowInsert(t *rapid.T) action {
	return action{
		do: "slow insert", long: time.Duration(rapid.IntRange(1, 5000).Draw(t, "insertion")) * time.Millisecond,
		written: rapid.Bool().Draw(t, "written"),
	}
}

// action is one line of a script.
type action struct {
	do string
	// which selects the event that the action concerns, or the place of a new one.
	which int
	// long is a duration, for example of a pause or a fault.
	long time.Duration
	// fault is the operation that fails, for "faults". written says that the store has done the operation before it fails or takes long.
	fault   string
	written bool
}

func (a action) String() string {
	text := fmt.Sprintf("%s %d %s", a.do, a.which, a.long)
	if a.fault != "" {
		text += fmt.Sprintf(" %s %t", a.fault, a.written)
	}
	return text
}

// faults are what can fail: operations of the store, and steps of the roomserver.
var faults = []string{"insert", "refresh", "claim", "read", "drop", "delete", "doubt", "delegate", "build", "input", "slow build", "slow input"}

// actions draws the actions of a script.
func actions(calm bool) *rapid.Generator[action] {
	todo := []string{
		"send", "send", "refresh", "refresh", "sleep", "sleep", "end", "repeat", "replace", "replace remotely", "tell", "redact", "leave",
		"purge", "change", "delegate", "delegate", "keep alive", "finish",
	}
	if !calm {
		todo = append(todo, "faults", "faults", "slow insert", "slow insert", "slow insert", "heal", "crash", "lose", "store",
			"overtake", "overtake")
	}
	return actionsOf(todo, faults)
}

// actionsOf draws an action of a script. One that breaks something draws what it breaks.
func actionsOf(todo, faults []string) *rapid.Generator[action] {
	return rapid.Custom(func(t *rapid.T) action {
		a := action{
			do:    rapid.SampledFrom(todo).Draw(t, "do"),
			which: rapid.IntRange(0, 7).Draw(t, "which"),
			long:  time.Duration(rapid.IntRange(1, 12_000).Draw(t, "ms"))*time.Millisecond + 137*time.Microsecond,
		}
		if a.do == "faults" {
			a.fault = rapid.SampledFrom(faults).Draw(t, "fault")
		}
		if a.do == "faults" || a.do == "slow insert" {
			a.written = rapid.Bool().Draw(t, "written")
		}
		return a
	})
}

// delayedActions draws the actions of a script, as actions does.
func delayedActions(calm bool) *rapid.Generator[action] {
	todo := []string{
		"schedule", "schedule", "restart", "restart", "sleep", "sleep", "send", "cancel", "repeat", "refuse", "accept",
		"set", "set silently", "list", "change", "purge", "leave", "redact", "delegate", "delegate", "keep alive", "finish",
	}
	operations := []string{
		"insert", "refresh", "claim", "read", "drop", "finalise", "finalised", "requested", "delegate", "build", "input", "slow build",
		"slow input",
	}
	if !calm {
		todo = append(todo, "faults", "faults", "slow insert", "slow insert", "slow insert", "heal", "crash", "overtake", "overtake")
	}
	return actionsOf(todo, operations)
}

// setSlowly makes insertions as slow as an action of the model says. The time is no whole number of milliseconds, and differs from all
// other times in the model. So no two things happen at the same moment, in an order that would be random.
func (s *memoryStore) setSlowly(broken map[string]action) {
	a, slow := broken["slow insert"]
	if !slow {
		s.setInsertTakes(0, false)
		return
	}
	s.setInsertTakes(a.long.Truncate(time.Millisecond)+71*time.Microsecond, a.written)
}
