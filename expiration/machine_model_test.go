package expiration

import (
	"errors"
	"fmt"
	"slices"
	"testing/synctest"
	"time"
)

// What the model of TestMachine knows of each event, and what must hold.

// life is what the model knows of an expiring event.
type life struct {
	event Event
	hash  TokenHash
	// duration and earliest are those of the last successful refresh. After a refresh that may have been written, each is the smaller of
	// both values.
	duration time.Duration
	earliest time.Time
	// excused: there need not be a closing event. stopped: the token must be invalid too. superseded: it is stopped because of newer state
	// that was sent here.
	excused, stopped, superseded bool
	// refused: the token was refused as unknown once.
	refused bool
	// pending: the event is not sent yet, and the client does not know the token.
	pending bool
	// remote is when an event of another server replaced this one, or zero.
	remote time.Time
}

// all returns all events so far.
func (m *machine) all() []*life {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.lives)
}

// now returns a copy of what is known of an event.
func (m *machine) now(l *life) life {
	m.mu.Lock()
	defer m.mu.Unlock()
	return *l
}

// never notes that an event was not sent.
func (m *machine) never(l *life) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.orphans = true
	m.lives = slices.DeleteFunc(m.lives, func(other *life) bool { return other == l })
}

// replaced notes that the events of a piece of state, except for keep, are no longer current.
func (m *machine) replaced(s StateKey, here bool, keep ...*life) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.lives {
		if its, ok := l.event.State(); !ok || its != s || l.pending || slices.Contains(keep, l) {
			continue // a pending event will be newer
		}
		l.excused = true
		if l.remote.IsZero() && !here {
			l.remote = time.Now()
		}
		if here {
			l.stopped, l.superseded = true, true
		}
	}
}

// stop notes that some events need no closing event from now on. If there is a reason, the roomserver refuses their closing events.
func (m *machine) stop(reason DropReason, which func(*life) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.lives {
		if !which(l) {
			continue
		}
		l.excused, l.stopped = true, true
		if reason != "" {
			m.w.roomserver.refuse(l.event.ID, reason)
		}
	}
}

// refreshed notes the answer of a refresh or restart.
func (m *machine) refreshed(l *life, d time.Duration, err error) {
	due := time.Now().Add(d)
	switch {
	case err == nil:
		if l := m.now(l); l.stopped || l.refused {
			m.problem("%s was refreshed: stopped %t, refused before %t", l.event.ID, l.stopped, l.refused)
		}
		if c := m.closingOf(l); c != nil {
			m.problem("%s was refreshed and has been closed by %s", l.event.ID, c.eventID)
		}
		l.duration, l.earliest = d, due
	case errors.Is(err, ErrNotFound):
		m.refuse(l, "refresh")
	default: // the refresh may have been written
		m.failed(err)
		l.duration = min(d, l.duration)
		if due.Before(l.earliest) {
			l.earliest = due
		}
	}
}

// refuse notes that a token was refused as unknown.
func (m *machine) refuse(l *life, method string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l.refused = true
	if m.calm && !l.excused && m.closingOf(l) == nil {
		m.problems = append(m.problems, fmt.Sprintf("%s of %s was refused, and it runs", method, l.event.ID))
	}
}

// failed notes an error, which is a problem unless the script has caused a fault.
func (m *machine) failed(err error) {
	if m.calm || !errors.Is(err, errFault) {
		m.problem("failed: %s", err)
	}
}

// closingOf returns the closing event of an event, or nil.
func (m *machine) closingOf(l *life) *closing {
	for _, c := range m.w.roomserver.closings() {
		if c.closes == l.event.ID {
			return &c
		}
	}
	return nil
}

// checkClosings checks what must hold at every moment.
func (m *machine) checkClosings() {
	seen := map[string]string{}
	for _, c := range m.w.roomserver.closings() {
		if other, ok := seen[c.closes]; ok {
			m.problem("%s was closed by %s and by %s", c.closes, other, c.eventID)
		}
		seen[c.closes] = c.eventID
		lives := m.all()
		i := slices.IndexFunc(lives, func(l *life) bool { return l.event.ID == c.closes })
		if i < 0 {
			m.problem("%s closes %s, which was never sent", c.eventID, c.closes)
			continue
		}
		l := m.now(lives[i])
		if c.outcome == Expired && (c.sent.Before(l.earliest) || m.calm && !c.at.Equal(l.earliest)) {
			m.problem("%s expired at %s, bears %s, its deadline was %s", c.closes, c.at, c.sent, l.earliest)
		}
		if _, isState := l.event.State(); isState && c.over != c.closes && (l.remote.IsZero() || l.remote.Before(c.built)) {
			m.problem("%s, which closes %s, replaced %s", c.eventID, c.closes, c.over)
		}
	}
}

// finish removes all faults, waits until no work is left, and checks the result.
func (m *machine) finish() {
	clear(m.broken)
	m.setFaults()
	time.Sleep(5 * time.Minute)
	m.ends.Wait()
	m.checkOver()
	if !m.calm {
		// The next start finds claims whose write seemed to fail, and rows of events that were never sent.
		m.crash(time.Second)
		time.Sleep(5 * time.Minute)
		if m.orphans {
			time.Sleep(givenUpAfter * lastPause)
		}
		m.checkOver()
	}
	if n := m.w.store.len(); n > 0 {
		m.problem("%d rows are left", n)
	}
	m.checkIndex()
	if !m.w.index.Empty() {
		m.problem("the index is not empty")
	}
}

// checkOver checks that every event is closed or excused.
func (m *machine) checkOver() {
	synctest.Wait()
	m.checkClosings()
	for _, l := range m.all() {
		if m.closingOf(l) == nil && !m.now(l).excused {
			m.problem("%s was never closed", l.event.ID)
		}
		if m.w.known(l.hash) {
			m.problem("the token of %s is still known", l.event.ID)
		}
	}
}

// checkIndex checks the invariants of the index, and of the delegations.
func (m *machine) checkIndex() {
	if err := m.w.invariants(); err != nil {
		m.problem("the index: %s", err)
	}
	for _, wrong := range m.w.store.wrongDelegations() {
		m.problem("%s", wrong)
	}
}
