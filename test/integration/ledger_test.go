//go:build all

package integration

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// ledger records the requests of random clients and the server's answers. It knows what must be true after any crash or outage. Everything
// that is not true is a fault.
type ledger struct {
	actors []*actor
	// claims are the closing events of events that were claimed after a crash, by the ID of the original.
	claims map[string]string
	// delayedClaims are the events of delayed events that were claimed after a crash, by the hash of the delay ID.
	delayedClaims map[expiration.TokenHash]string
	// overdue are the events that were running and overdue after each crash.
	overdue []overdue
	faults  []string
}

// overdue are events of one room whose deadlines passed while the server was down, in the order of the deadlines.
type overdue struct {
	found  time.Time
	events []string
}

func newLedger() *ledger {
	return &ledger{claims: map[string]string{}, delayedClaims: map[expiration.TokenHash]string{}}
}

func (l *ledger) fault(format string, args ...any) {
	l.faults = append(l.faults, fmt.Sprintf(format, args...))
}

// entry is the ledger's record of one expiring event, or one plain state event, of a client.
type entry struct {
	n         int
	path      string
	body      JSON
	key       string // the state key, or "" for a message
	life      time.Duration
	eventID   string // "" until there is an answer
	token     string
	earliest  time.Time // the earliest time at which it may expire
	touched   time.Time // the time of the last request about it
	replaced  bool      // another event for its state key was answered
	ended     bool      // end was answered with 200
	dead      bool      // its token was refused, or must be
	ending    bool      // end had no answer; it may be claimed already, and then another end finishes it
	retried   bool      // the first request for it had no answer
	uncertain bool      // it may have been replaced or ended by a request without an answer
}

func (e *entry) String() string {
	what := "message"
	if e.key != "" {
		what = "state " + e.key
	}
	if e.retried {
		what += ", sent again"
	}
	return fmt.Sprintf("%s, %d s", what, int(e.life.Seconds()))
}

// crashed records the state of the timers' rows after a crash, while the server is down.
func (l *ledger) crashed(rows []expiration.Timer) {
	now := time.Now()
	entries := l.entries()
	rooms := map[string][]string{}
	for _, row := range rows {
		if row.Delayed != nil {
			if row.Claim != nil {
				l.delayedClaims[row.TokenHash] = row.Claim.Event.EventID
			}
		} else if row.Claim != nil {
			before, ok := l.claims[row.Event.ID]
			if ok && before != row.Claim.Event.EventID {
				l.fault("%s was claimed for %s, and then for %s", row.Event.ID, before, row.Claim.Event.EventID)
			}
			l.claims[row.Event.ID] = row.Claim.Event.EventID
		} else if entries[row.Event.ID] != nil && row.Deadline.Before(now) {
			rooms[row.Event.RoomID] = append(rooms[row.Event.RoomID], row.Event.ID)
		}
	}
	for _, events := range rooms {
		l.overdue = append(l.overdue, overdue{now, events})
	}
}

// entries returns the entries whose sends were answered, by event ID.
func (l *ledger) entries() map[string]*entry {
	entries := map[string]*entry{}
	for _, a := range l.actors {
		for _, e := range a.entries {
			if e.eventID != "" {
				entries[e.eventID] = e
			}
		}
	}
	return entries
}

// checkTokens requires that the server refuses all tokens. After settle, no event is running any more.
func (l *ledger) checkTokens(ctx context.Context) {
	for _, a := range l.actors {
		for _, e := range a.entries {
			if e.token == "" {
				continue
			}
			if res, err := a.KeepAlive(ctx, "refresh", e.token); err != nil || res.Code != http.StatusNotFound {
				l.fault("the token of %s outlives it: %v %v", e.eventID, res, err)
			}
		}
	}
}

// current returns the IDs of the events that are the current state.
func (l *ledger) current(t *testing.T) map[string]bool {
	t.Helper()
	current := map[string]bool{}
	for _, a := range l.actors {
		for key := range actorKeys {
			current[a.state(t, a.roomID, stateKey(key)).Get("event_id").Str] = true
		}
	}
	return current
}

// check compares the ledger with the roomserver's final state: all its events, and the current state. It also checks the timers that are
// left.
func (l *ledger) check(events []roomEvent, left []expiration.Timer, current map[string]bool) {
	byID, closings := map[string]roomEvent{}, map[string][]roomEvent{}
	for _, e := range events {
		byID[e.id] = e
		if e.closes != "" && e.sent {
			closings[e.closes] = append(closings[e.closes], e)
		}
	}
	entries := l.entries()
	l.checkEntries(entries, byID, closings)
	l.checkEvents(events, entries, closings, current)
	l.checkClosings(entries, byID, closings)
	l.checkOrder(entries, closings)
	for _, row := range left {
		if byID[row.Event.ID].sent {
			l.fault("%s still has a row (claimed: %t)", row.Event.ID, row.Claim != nil)
		}
	}
}

// checkEntries: the answers were true.
func (l *ledger) checkEntries(entries map[string]*entry, byID map[string]roomEvent, closings map[string][]roomEvent) {
	for _, e := range entries {
		// Dendrite itself may deliver a plain event some minutes after a crash.
		if at, ok := byID[e.eventID]; !at.sent && (e.life > 0 || !e.retried) {
			l.fault("%s (%s) was answered and is not in its room (stored: %t)", e.eventID, e, ok)
		}
		if e.ended && (len(closings[e.eventID]) != 1 || closings[e.eventID][0].json.Get(`content.m\.will_expire`).Str != "ended") {
			l.fault("%s was ended and is not", e.eventID)
		}
	}
}

// checkEvents: each running event was closed exactly once, or replaced. No message was sent twice.
func (l *ledger) checkEvents(
	events []roomEvent, entries map[string]*entry, closings map[string][]roomEvent, current map[string]bool,
) {
	messages := map[string]string{}
	for _, e := range events {
		if !e.running || !e.sent {
			continue
		}
		switch n := len(closings[e.id]); {
		case n > 1:
			l.fault("%s was closed %d times", e.id, n)
		case n == 0 && (e.state() == "" || current[e.id]):
			l.fault("%s runs for ever (answered: %t)", e.id, entries[e.id] != nil)
		}
		if e.state() == "" {
			n := e.json.Get("room_id").Str + e.json.Get("content.n").Raw
			// The server forgets a request when it deletes the timer.
			if closed := closings[messages[n]]; messages[n] != "" && (len(closed) == 0 || closed[0].depth > e.depth) {
				l.fault("%s and %s are the same message", e.id, messages[n])
			}
			messages[n] = e.id
		}
	}
}

// checkClosings: each closing event is the claimed one, was not early, is a copy of its original, and overwrote no newer state.
func (l *ledger) checkClosings(entries map[string]*entry, byID map[string]roomEvent, closings map[string][]roomEvent) {
	answered := map[string][]roomEvent{} // the answered events, by place
	for _, e := range entries {
		answered[byID[e.eventID].place()] = append(answered[byID[e.eventID].place()], byID[e.eventID])
	}
	for original, found := range closings {
		c := found[0]
		if claimed := l.claims[original]; claimed != "" && claimed != c.id {
			l.fault("%s was claimed for %s and closed by %s", original, claimed, c.id)
		}
		want, _ := byID[original].json.Get("content").Value().(map[string]any)
		got, _ := c.json.Get("content").Value().(map[string]any)
		want = maps.Clone(want)
		want["m.will_expire"], want["m.relates_to"] = got["m.will_expire"], got["m.relates_to"]
		if fmt.Sprint(want) != fmt.Sprint(got) || c.state() != byID[original].state() {
			l.fault("%s is not a copy of %s", c.id, original)
		}
		e := entries[original]
		if e == nil {
			continue
		}
		if early := e.earliest.Sub(time.UnixMilli(c.timestamp())); got["m.will_expire"] == "expired" && early > time.Millisecond {
			l.fault("%s expired %s early", original, early)
		}
		for _, at := range answered[c.place()] {
			if e.key == "" || at.depth <= byID[original].depth || at.depth > c.depth {
				continue
			}
			if at.timestamp() < byID[original].timestamp() && !at.after(byID[original], byID) {
				continue // the room's state had regressed, and the original is the later event
			}
			switch {
			case c.after(at, byID):
				l.fault("%s was closed by %s over %s (%s)", byID[original], c, at, entries[at.id])
			case at.timestamp() < c.timestamp():
				// Neither event is an ancestor of the other. State resolution prefers the later one.
				l.fault("%s was closed by %s across %s (%s), which lost", byID[original], c, at, entries[at.id])
			}
		}
	}
	for original, claimed := range l.claims {
		if len(closings[original]) == 0 {
			l.fault("%s was claimed for %s and never closed", original, claimed)
		}
	}
}

// checkOrder: the events that expired while the server was down were closed in the order of their deadlines, room by room. It does not
// compare depths, because a regression of the room's state also reduces the depth of later events.
func (l *ledger) checkOrder(entries map[string]*entry, closings map[string][]roomEvent) {
	for _, o := range l.overdue {
		last, lastID := int64(0), ""
		for _, id := range o.events {
			if len(closings[id]) == 0 || entries[id].touched.After(o.found) {
				continue
			}
			if c := closings[id][0]; c.nid < last {
				l.fault("%s was closed before %s, whose deadline came first, and both had passed at %s", id, lastID, o.found.Format(time.RFC3339Nano))
			} else {
				last, lastID = c.nid, id
			}
		}
	}
}

// require fails the test if there are faults, and shows the log lines about the events.
func (l *ledger) require(t *testing.T, s *server) {
	t.Helper()
	slices.Sort(l.faults)
	for _, fault := range l.faults[:min(len(l.faults), 20)] {
		t.Error(fault)
	}
	if len(l.faults) > 0 {
		s.mentions(t, eventIDPattern.FindAllString(strings.Join(l.faults[:min(len(l.faults), 5)], " "), -1))
	}
	if len(l.faults) > 20 {
		t.Errorf("… and %d faults more", len(l.faults)-20)
	}
}

var eventIDPattern = regexp.MustCompile(`\$[\w-]{43}`)

// mentions logs the last lines of the server's log about the given events, or about rows that it could not read.
func (s *server) mentions(t *testing.T, eventIDs []string) {
	t.Helper()
	written, err := s.Written()
	require.NoError(t, err)
	var lines []string
	for line := range strings.Lines(string(written)) {
		if strings.Contains(line, `event_id= `) || slices.ContainsFunc(eventIDs, func(id string) bool { return strings.Contains(line, id) }) {
			lines = append(lines, fmt.Sprintf("%.600s", line))
		}
	}
	t.Logf("the server's log of these events:\n%s", strings.Join(lines[max(len(lines)-100, 0):], "\n"))
}

// visible requires that clients see all closing events in the end.
func (l *ledger) visible(t *testing.T, events []roomEvent) {
	t.Helper()
	for _, a := range l.actors {
		eventuallyWithin(t, afterCrash, "clients see all closing events of "+a.roomID, func() bool {
			seen := map[string]bool{}
			for _, e := range a.timeline(t, a.roomID) {
				seen[e.Get("event_id").Str] = true
			}
			return !slices.ContainsFunc(events, func(e roomEvent) bool {
				return e.closes != "" && e.json.Get("room_id").Str == a.roomID && !seen[e.id]
			})
		})
	}
}
