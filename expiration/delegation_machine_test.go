package expiration

import (
	"context"
	"errors"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
)

// What the models of TestMachine and TestDelayedMachine do with delegations, and what must hold.

// tryDelegate delegates a timer as somebody does who has its token, to one of a few members or, with 0, to none.
func (w *world) tryDelegate(k Kept, member byte) error {
	d, err := w.Find(w.t.Context(), k, "", "")
	if err != nil {
		return err
	}
	d.MemberKey = [32]byte{member}
	return w.Delegate(w.t.Context(), d)
}

// delegate delegates the timer of an event that has not ended.
func (m *machine) delegate(l *life, member byte) {
	err := m.w.tryDelegate(Kept{Hash: l.hash}, member)
	switch {
	case err == nil:
		if before := m.now(l); before.stopped || before.refused || m.closingOf(l) != nil {
			m.problem("%s was delegated: stopped %t, refused before %t", l.event.ID, before.stopped, before.refused)
		}
	case errors.Is(err, ErrNotFound):
		m.refuse(l, "delegate")
	default:
		m.failed(err)
	}
}

// keptLonger notes, between two processes, that the next one leaves timers with a delegation alone for some time.
func (m *machine) keptLonger() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, row := range m.w.store.kept() {
		for _, l := range m.lives {
			if l.event.ID == row.Event.ID {
				l.earliest = afterGrace(l.earliest)
			}
		}
	}
}

// afterGrace returns the earliest time at which a timer acts if the next process starts now.
func afterGrace(earliest time.Time) time.Time {
	if grace := time.Now().Add(keptGrace); grace.After(earliest) {
		return grace
	}
	return earliest
}

// delegate delegates the timer of an event that is scheduled.
func (m *delayedMachine) delegate(l *delayedLife, member byte) {
	sent := m.sentAs(l)
	err := m.told(l.delayID, m.w.tryDelegate(keptDelayed(l.delayID), member))
	m.mu.Lock()
	final := l.final
	m.mu.Unlock()
	switch {
	case err != nil:
		m.ended(l, err)
	case sent != "" || final != nil:
		m.problem("%s was delegated: sent as %q, finalised %+v", l.content, sent, final)
	}
}

// keepAlive keeps a timer alive.
func (m *delayedMachine) keepAlive(ctx context.Context, delayID, _ string) error {
	return m.told(delayID, m.w.KeepAlive(ctx, keptDelayed(delayID)))
}

// told replaces ErrNotFound, as onDelayed does.
func (m *delayedMachine) told(delayID string, err error) error {
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	return m.w.onDelayed(m.w.t.Context(), HashToken(delayID), alice, func(*index.Timer) error { return ErrNotFound })
}

// keptLonger is machine.keptLonger.
func (m *delayedMachine) keptLonger() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, row := range m.w.store.kept() {
		for _, l := range m.lives {
			if l.content == string(row.Delayed.Content) {
				l.earliest = afterGrace(l.earliest)
			}
		}
	}
}
