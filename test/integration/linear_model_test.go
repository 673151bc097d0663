//go:build all

package integration

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// The sequential model of one state key, and the search for an order that explains a history.

// These are the steps of the model that are not requests.
const (
	// answered: the send of an event is about to be answered. From now on the tokens of replaced events are invalid.
	answered verb = "answered"
	// claim: the server decides to close an event. The event's token is now invalid.
	claim verb = "claim"
	// show: the closing event becomes the current state.
	show verb = "show"
)

const (
	// tick is the resolution of origin_server_ts.
	tick = int64(time.Millisecond)
	// never is the time at which an ended event would expire.
	never = int64(1) << 62
)

// step is an atomic action.
type step struct {
	verb  verb
	event int // the event that is sent, read or shown, or whose token is used
	// at depends on the verb. For send and refresh it is the earliest time from which the duration counts. For claim it is the time of the
	// closing event.
	at       int64
	duration int64 // of send; 0 if the event does not expire
	closes   int   // of show: the original
	refused  bool  // of refresh and end: the token was refused
}

// kind describes the step without the event.
func (s step) kind() string {
	switch {
	case s.refused:
		return string(s.verb) + " refused"
	case s.verb == send && s.duration > 0:
		return "send expiring"
	case s.verb == claim && s.at == never:
		return "claim ended"
	case s.verb == claim:
		return "claim expired"
	}
	return string(s.verb)
}

func (s step) String() string {
	text := fmt.Sprintf("%s e%d", s.kind(), s.event)
	switch {
	case s.verb == show:
		text += fmt.Sprintf(", closing e%d", s.closes)
	case s.verb == send && s.duration > 0:
		text += fmt.Sprintf(", for %s", time.Duration(s.duration))
	}
	return text
}

// These are the phases of an event's life in the model.
const (
	unseen  = '-' // not sent yet
	running = 'r' // its token is valid, also for a moment after another event has become the current state
	claimed = 'c' // it will be closed; its token is invalid
	over    = '.' // it has no valid token, and never will
)

// keyState is the state of one state key in the model. It is comparable.
type keyState struct {
	current int
	lives   string // one character for each event
	// since and duration belong to the current event, if it is running. It must not expire before since+duration.
	since, duration int64
}

func (s keyState) life(event int) byte { return s.lives[event] }

func (s keyState) with(event int, life byte) keyState {
	lives := []byte(s.lives)
	lives[event] = life
	s.lives = string(lives)
	return s
}

// model is the specification of one state key.
func (h *history) model() porcupine.Model {
	return porcupine.Model{
		Init: func() any {
			return keyState{current: none, lives: strings.Repeat(string(unseen), len(h.events))}
		},
		Step: func(state, input, _ any) (bool, any) {
			next, ok := h.step(state.(keyState), input.(step))
			return ok, next
		},
		DescribeOperation: func(input, _ any) string { return input.(step).String() },
		DescribeState: func(state any) string {
			s := state.(keyState)
			text := fmt.Sprintf("current e%d, %s", s.current, s.lives)
			if s.current != none && s.life(s.current) == running {
				text += ", until " + time.Unix(0, s.since+s.duration).UTC().Format(time.StampMicro)
			}
			return text
		},
	}
}

// step returns the state after a step, and false if the step is not allowed.
func (h *history) step(s keyState, do step) (keyState, bool) {
	switch do.verb {
	case send:
		return h.send(s, do)
	case answered: // from now on replaced events have no valid tokens
		if s.life(do.event) == unseen {
			return s, false
		}
		for i := range h.events {
			if s.life(i) == running && i != s.current {
				s = s.with(i, over)
			}
		}
		return s, true
	case read:
		return s, s.current == do.event
	case refresh:
		if do.refused {
			return refuse(s, do.event)
		}
		if do.event == s.current { // of several concurrent refreshes, the last one counts
			s.since = max(s.since, do.at)
		}
		return s, s.life(do.event) == running
	case end: // an accepted end is a claim and a show
		return refuse(s, do.event)
	case claim:
		early := do.at+tick < s.since+s.duration
		return s.with(do.event, claimed), s.life(do.event) == running && s.current == do.event && !early
	case show:
		ok := s.life(do.closes) == claimed && s.current == do.closes && s.life(do.event) == unseen
		s.current = do.event
		return s.with(do.closes, over).with(do.event, over), ok
	}
	return s, false
}

// send handles a new event. A send with content and sender of the current event, while that is running, only restarts its timer.
func (h *history) send(s keyState, do step) (keyState, bool) {
	e := h.events[do.event]
	if s.current != none && s.life(s.current) == running && e.expires {
		current := h.events[s.current]
		if current.content == e.content && current.user == e.user {
			s.since, s.duration = max(s.since, do.at), do.duration
			return s, s.current == do.event
		}
	}
	ok := s.life(do.event) == unseen
	s.current = do.event
	if !e.expires {
		return s.with(do.event, over), ok
	}
	s.since, s.duration = do.at, do.duration
	return s.with(do.event, running), ok
}

// refuse handles the refusal of a token. A refusal is final, also for a token that was about to become invalid.
func refuse(s keyState, event int) (keyState, bool) {
	if s.life(event) != running {
		return s, true
	}
	return s.with(event, over), s.current != event
}

// check searches for an order that explains the history, and reports whether there is one. If there is none, it prints the history. It
// also draws the history, if the environment variable KEEP_LOGS names a folder.
func (h *history) check(t *testing.T, name string) bool {
	t.Helper()
	result, info := porcupine.CheckOperationsVerbose(h.model(), h.operations, linearPatience)
	if result == porcupine.Ok {
		return true
	}
	var text strings.Builder
	first := slices.MinFunc(h.operations, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) }).Call
	slices.SortFunc(h.operations, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
	for _, op := range h.operations {
		fmt.Fprintf(&text, "%12s to %12s, client %d: %s\n", time.Duration(op.Call-first), time.Duration(op.Return-first), op.ClientId/2, op.Input)
	}
	for i, e := range h.events {
		fmt.Fprintf(&text, "e%d is %s\n", i, e.id)
	}
	t.Errorf("no order explains this history (%s):\n%s", result, &text)
	if dir := os.Getenv("KEEP_LOGS"); dir != "" {
		if err := porcupine.VisualizePath(h.model(), info, filepath.Join(dir, name+".html")); err != nil {
			t.Error(err)
		}
	}
	return false
}
