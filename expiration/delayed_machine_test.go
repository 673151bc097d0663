package expiration

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// TestDelayedMachine is TestMachine for delayed events. All belong to Alice; they are messages, or state under one of three keys.
func TestDelayedMachine(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			rapid.Check(t, func(rt *rapid.T) {
				script := rapid.SliceOfN(delayedActions(mode.calm), 1, 30).Draw(rt, "script")
				if mode.slow {
					script = slices.Insert(script, 0, slowInsert(rt))
				}
				var problems []string
				synctest.Test(t, func(t *testing.T) { problems = playDelayed(t, mode.calm && !mode.slow, script) })
				if len(problems) > 0 {
					rt.Log(strings.Join(problems, "\n"))
					rt.Fatalf("a guarantee was broken")
				}
			})
		})
	}
}

// delayedMachine plays a script.
type delayedMachine struct {
	w      *world
	calm   bool
	lives  []*delayedLife
	sends  sync.WaitGroup // calls of SendDelayed in progress, and of Schedule while the store is slow
	broken map[string]action

	mu       sync.Mutex // guards problems, and the fields final, delayID and earliest of each life
	problems []string
}

// playDelayed plays a script and returns the problems.
func playDelayed(t *testing.T, calm bool, script []action) []string {
	m := &delayedMachine{calm: calm, broken: map[string]action{}}
	m.w = &world{t: t, store: newMemoryStore(), roomserver: newFakeRoomserver()}
	m.w.start(Config{MaxScheduledPerUser: 100, MaxFinalisedPerUser: 100, KeepFinalised: time.Hour})
	for _, a := range script {
		m.act(a)
		synctest.Wait()
		m.checkIndex()
		m.checkSent()
	}
	m.finish()
	m.w.Stop()
	return m.problems
}

func (m *delayedMachine) problem(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.problems = append(m.problems, fmt.Sprintf(format, args...))
}

func (m *delayedMachine) act(a action) {
	switch a.do {
	case "sleep":
		time.Sleep(a.long)
	case "schedule":
		l := &delayedLife{event: later("!room"), content: fmt.Sprint(len(m.lives)), delay: a.long}
		if key := a.which & 3; key > 0 {
			l.event = leave(fmt.Sprint(key))
		}
		l.event = requested(l.event, byte(len(m.lives)+1))
		m.lives = append(m.lives, l)
		if _, slow := m.broken["slow insert"]; slow { // the script goes on meanwhile
			m.sends.Go(func() { m.schedule(l) })
			return
		}
		m.schedule(l)
	case "faults":
		m.broken[a.fault] = a
		m.setFaults()
	case "slow insert":
		m.broken[a.do] = a
		m.setFaults()
	case "heal":
		clear(m.broken)
		m.setFaults()
	case "crash":
		m.crash(a.long)
	case "set", "set silently":
		m.set(a)
	case "list":
		m.list()
	case "change":
		if err := m.w.RoomChanged(m.w.t.Context(), "!room"); err != nil {
			m.failed(err)
		}
	case "purge":
		m.purge()
	case "leave": // does not concern delayed events
		m.w.DropSender(m.w.t.Context(), "!room", alice, time.Now())
	case "redact": // does not concern delayed events
		for _, e := range m.w.roomserver.sent() {
			m.w.DropEvent(m.w.t.Context(), e.eventID, Redacted)
		}
	default:
		if len(m.lives) > 0 {
			// Usually one of the newest.
			m.actOn(a, m.lives[max(0, len(m.lives)-1-a.which/2)])
		}
	}
}

// actOn does what act does, for actions on a delayed event.
func (m *delayedMachine) actOn(a action, l *delayedLife) {
	switch a.do {
	case "repeat":
		m.schedule(l)
	case "refuse":
		m.w.roomserver.refuse(l.content, Forbidden)
		l.refused = true
	case "accept":
		m.w.roomserver.refuse(l.content, "")
	}
	if m.delayID(l) == "" {
		return
	}
	ctx := m.w.t.Context()
	switch a.do {
	case "overtake": // a restart during the building of the event
		m.broken["slow build"] = a
		m.setFaults()
		time.Sleep(time.Until(l.earliest.Add(time.Millisecond)))
		m.restart(l, m.w.RestartDelayed)
	case "restart":
		m.restart(l, m.w.RestartDelayed)
	case "keep alive":
		m.restart(l, m.keepAlive)
	case "delegate":
		m.delegate(l, byte(a.which))
	case "send", "finish":
		l.sendAsked = true
		send := func() error { return m.w.SendDelayed(ctx, l.delayID, alice) }
		if a.do == "finish" {
			send = func() error { return m.w.Finish(ctx, keptDelayed(l.delayID)) }
		}
		m.sends.Go(func() {
			err := send()
			if err == nil && m.sentAs(l) == "" {
				m.problem("%s was sent, and is not in its room", l.content)
			}
			if refused := (*RefusedError)(nil); !errors.As(err, &refused) || !l.refused {
				m.ended(l, err)
			}
		})
	case "cancel":
		l.cancelAsked = true
		err := m.w.CancelDelayed(ctx, l.delayID, alice)
		if err == nil {
			err = &FinalisedError{}
		}
		m.ended(l, err)
	}
}

// schedule schedules an event for the first time, or repeats the request.
func (m *delayedMachine) schedule(l *delayedLife) {
	due := time.Now().Add(l.delay)
	m.mu.Lock()
	if l.earliest.IsZero() { // a failed insertion may have been written
		l.earliest = due
	}
	m.mu.Unlock()
	delayID, err := m.w.Schedule(m.w.t.Context(), l.event, Delayed{Content: []byte(l.content)}, l.delay, false)
	if err != nil {
		m.failed(err)
		return
	}
	m.mu.Lock()
	before := l.delayID
	l.delayID = delayID
	m.mu.Unlock()
	if before != "" && before != delayID {
		m.problem("%s has two delay IDs, %s and %s", l.content, before, delayID)
	}
}

// list requires that the list contains every event whose delay ID the client knew before, that is not due yet, and that has no other
// result.
func (m *delayedMachine) list() {
	var told []*delayedLife
	for _, l := range m.lives {
		if m.delayID(l) != "" && !l.cancelAsked && !l.sendAsked && !l.purged {
			told = append(told, l)
		}
	}
	listed := map[string]bool{}
	for e, err := range m.w.DelayedEvents(m.w.t.Context(), alice, "") {
		if err != nil {
			m.failed(err)
			return
		}
		listed[e.DelayID] = true
	}
	for _, l := range told {
		if time.Now().Before(l.earliest) && !listed[l.delayID] {
			m.problem("%s is scheduled, and not in the list", l.content)
		}
	}
}

// purge purges the room.
func (m *delayedMachine) purge() {
	for _, l := range m.lives {
		l.purged = true
	}
	m.w.DropRoom(m.w.t.Context(), "!room")
	if !m.calm {
		return
	}
	for _, l := range m.lives {
		if m.look(l); l.final == nil {
			m.problem("%s is still scheduled, and its room was purged", l.content)
		}
	}
}

func (m *delayedMachine) restart(l *delayedLife, restart func(ctx context.Context, delayID, owner string) error) {
	sent, due := m.sentAs(l), time.Now().Add(l.delay)
	err := restart(m.w.t.Context(), l.delayID, alice)
	m.mu.Lock()
	final := l.final
	m.mu.Unlock()
	switch {
	case err != nil:
		m.ended(l, err)
	case sent != "" || final != nil:
		m.problem("%s was restarted: sent as %q, finalised %+v", l.content, sent, final)
	default:
		m.mu.Lock()
		l.earliest = due
		m.mu.Unlock()
	}
}

// set sets a piece of state, as Alice or as another user, and reports it to the timers or not. It does not concern delayed events.
func (m *delayedMachine) set(a action) {
	e, sender := leave(fmt.Sprint(a.which&3+1)), bob
	if a.which > 3 {
		sender = alice
	}
	if a.do == "set" {
		m.w.set(e, sender)
		return
	}
	m.w.events++
	m.w.roomserver.send(Event{ID: fmt.Sprintf("$silent%d", m.w.events), RoomID: e.RoomID, Type: e.Type, StateKey: e.StateKey, Sender: sender})
}

// look looks up the result of an event.
func (m *delayedMachine) look(l *delayedLife) {
	d, err := m.w.DelayedEvent(m.w.t.Context(), l.delayID, alice)
	switch {
	case errors.Is(err, ErrNotFound):
		m.problem("%s is not known", l.content)
	case err != nil:
		m.failed(err)
	case d.Final != nil:
		m.finalised(l, *d.Final)
	}
}

// setFaults applies the faults in broken.
func (m *delayedMachine) setFaults() {
	var h hooks
	for name, a := range m.broken {
		switch name {
		case "build":
			h.beforeClaim = fails
		case "input":
			h.afterClaim = fails
		case "slow build":
			h.beforeClaim = takes(a.long)
		case "slow input":
			h.afterClaim = takes(a.long)
		}
	}
	m.w.roomserver.set(h)
	m.w.store.setSlowly(m.broken)
	broken := maps.Clone(m.broken)
	m.w.store.set(false, func(operation string) error {
		a, ok := broken[operation]
		m.w.store.after = a.written
		if ok {
			return errFault
		}
		return nil
	})
}

// crash ends the process at once, and starts the next one.
func (m *delayedMachine) crash(down time.Duration) {
	m.w.roomserver.set(hooks{beforeClaim: fails, afterClaim: fails})
	m.w.store.set(false, func(string) error { return errFault })
	m.w.stop()
	m.w.Stop()
	m.sends.Wait()
	time.Sleep(down)
	m.keptLonger()
	m.w.store.set(false, nil) // a process that cannot load its timers does not start
	m.w.loaded = m.setFaults
	m.w.start(m.w.cfg)
}
