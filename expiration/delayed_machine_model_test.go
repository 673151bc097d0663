package expiration

import (
	"errors"
	"testing/synctest"
	"time"
)

// What the model of TestDelayedMachine knows of each event, and what must hold.

// delayedLife is what the model knows of a delayed event.
type delayedLife struct {
	event   Event
	content string // unique
	delayID string // "" if scheduling failed
	delay   time.Duration
	// earliest is the earliest possible deadline.
	earliest time.Time
	// These are possible reasons for another result than being sent at the deadline.
	sendAsked, cancelAsked, refused, purged bool
	// final is the result that the engine reported. Every later answer must agree with it.
	final *Final
}

// delayID returns the delay ID that the client got, or "".
func (m *delayedMachine) delayID(l *delayedLife) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return l.delayID
}

// failed notes an error, which is a problem unless the script has caused a fault.
func (m *delayedMachine) failed(err error) {
	if m.calm || !errors.Is(err, errFault) && !errors.Is(err, errLeftOver) && !errors.Is(err, errClaimFailed) {
		m.problem("failed: %s", err)
	}
}

// ended checks the answer of an action that may contain the result of an event.
func (m *delayedMachine) ended(l *delayedLife, err error) {
	var finalised *FinalisedError
	switch {
	case errors.As(err, &finalised):
		m.finalised(l, finalised.Final)
	case errors.Is(err, ErrNotFound):
		m.problem("%s is not known", l.content)
	case err != nil:
		m.failed(err)
	}
}

// finalised checks the result of an event against earlier answers.
func (m *delayedMachine) finalised(l *delayedLife, f Final) {
	m.mu.Lock()
	before, earliest := l.final, l.earliest
	l.final = &f
	m.mu.Unlock()
	switch {
	case before != nil && (before.EventID != f.EventID || before.Cancelled() != f.Cancelled()):
		m.problem("%s was %+v and is %+v", l.content, *before, f)
	case f.Cancelled() && !l.cancelAsked, f.Error != nil && !l.refused && !l.purged:
		m.problem("%s is %+v, without a reason", l.content, f)
	case f.Error != nil && !l.purged && f.At.Before(earliest.Truncate(time.Millisecond)):
		m.problem("%s failed at %s, and is due at %s", l.content, f.At, earliest)
	}
}

// sentAs returns the ID with which an event is in its room, or "".
func (m *delayedMachine) sentAs(l *delayedLife) string {
	for _, e := range m.w.roomserver.sent() {
		if e.content == l.content {
			return e.eventID
		}
	}
	return ""
}

// checkSent checks what must hold at every moment.
func (m *delayedMachine) checkSent() {
	seen := map[string]bool{}
	for _, e := range m.w.roomserver.sent() {
		if seen[e.content] {
			m.problem("%s was sent twice", e.content)
		}
		seen[e.content] = true
		for _, l := range m.lives {
			if l.content != e.content || l.sendAsked {
				continue
			}
			m.mu.Lock()
			earliest := l.earliest
			m.mu.Unlock()
			if e.at.Before(earliest) || m.calm && !e.at.Equal(earliest) {
				m.problem("%s was sent at %s, and due at %s", l.content, e.at, earliest)
			}
		}
	}
}

// finish removes all faults, waits until no work is left, and checks the result.
func (m *delayedMachine) finish() {
	clear(m.broken)
	m.setFaults()
	for range 2 {
		time.Sleep(5 * time.Minute)
		m.sends.Wait()
		m.checkOver()
		m.crash(time.Second)
	}
	if n := m.w.store.len(); n > 0 {
		m.problem("%d rows are left", n)
	}
	m.checkIndex()
	if !m.w.index.Empty() || len(m.w.inFlight) > 0 {
		m.problem("memory is not empty")
	}
}

// checkOver checks that every event has a result.
func (m *delayedMachine) checkOver() {
	synctest.Wait()
	m.checkSent()
	for _, l := range m.lives {
		if m.delayID(l) == "" {
			continue
		}
		m.look(l)
		eventID := m.sentAs(l)
		switch {
		case l.final == nil:
			m.problem("%s is still scheduled", l.content)
		case l.final.EventID != eventID:
			m.problem("%s was sent as %q, and is %+v", l.content, eventID, *l.final)
		case eventID != "":
			if delayIDs, err := m.w.DelayIDs(m.w.t.Context(), alice, []string{eventID}); err != nil || delayIDs[eventID] != l.delayID {
				m.problem("the delay ID of %s is %v (%v)", l.content, delayIDs, err)
			}
		}
	}
}

// checkIndex is machine.checkIndex.
func (m *delayedMachine) checkIndex() {
	if err := m.w.invariants(); err != nil {
		m.problem("the index: %s", err)
	}
	for _, wrong := range m.w.store.wrongDelegations() {
		m.problem("%s", wrong)
	}
}
