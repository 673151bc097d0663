package keeper

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

// TestKeeperMachine plays random scripts of participants, crashes and outages, and compares what the keeper does with the guarantees in the
// package comment. A script that fails is shrunk before it is shown.
func TestKeeperMachine(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		script := rapid.SliceOfN(actions, 20, 60).Draw(rt, "script")
		var problems []string
		synctest.Test(t, func(t *testing.T) { problems = play(t, script) })
		if len(problems) > 0 {
			rt.Log(strings.Join(problems, "\n"))
			rt.Fatalf("a guarantee was broken") // a constant text, so that shrinking accepts shorter scripts
		}
	})
}

// action is one step of a script.
type action struct {
	do    string
	who   int           // the participant
	long  time.Duration // a duration of the action's
	lost  bool          // the webhook is lost; of a fault, it is reported although the write happened
	token bool
	kind  livekit.Kind
	why   livekit.Reason
}

const people = 5

var actions = rapid.Custom(func(t *rapid.T) action {
	return action{
		do: rapid.SampledFrom([]string{
			"sleep", "sleep", "sleep", "sleep", "arrive", "arrive", "arrive", "delegate", "enter", "exit", "exit", "cancel", "hint",
			"restart LiveKit", "fault of LiveKit", "LiveKit hangs", "fault of the store", "heal", "heal", "crash", "crash", "step",
		}).Draw(t, "do"),
		who:   rapid.IntRange(0, people-1).Draw(t, "who"),
		long:  rapid.SampledFrom(durations).Draw(t, "long"),
		lost:  rapid.Bool().Draw(t, "lost"),
		token: rapid.Bool().Draw(t, "token"),
		kind: rapid.SampledFrom([]livekit.Kind{
			livekit.ParticipantJoined, livekit.ParticipantLeft, livekit.ParticipantAborted, livekit.RoomFinished,
		}).Draw(t, "kind"),
		why: rapid.SampledFrom([]livekit.Reason{"CONNECTION_TIMEOUT", livekit.ServerShutdown, livekit.StateMismatch}).Draw(t, "why"),
	}
})

var durations = []time.Duration{
	100 * time.Millisecond, time.Second, 10 * time.Second, 20 * time.Second, time.Minute, 5 * time.Minute, 40 * time.Minute, 90 * time.Minute,
}

// person is what the model knows of a participant.
type person struct {
	livekit.Participant
	online  bool // wants to be connected
	dropped bool // lost its connection because LiveKit was restarted
	// since is when the participant was connected, or disconnected, last. life is when it was connected, at the latest.
	since, life time.Time
	lostAt      time.Time // when it lost its connection and began to try again
	timers      []*handedOver
}

// handedOver is what the model knows of a timer.
type handedOver struct {
	kept  expiration.Kept
	delay time.Duration
	at    time.Time // when it was handed over
	// forgot is when the process died that had seen the participant, and could not note it. The next one waits for the participant.
	forgot   time.Time
	replaced bool // nothing is promised any more
	checked  bool // its end was checked
}

// machine plays a script.
type machine struct {
	w        *world
	people   []*person
	calmAt   time.Time // since when nothing is wrong, if calm
	calm     bool
	broken   bool      // the store has a fault
	healed   time.Time // when the last one ended
	answers  time.Time // since when LiveKit answers
	started  time.Time // when the process was started
	timers   int
	problems []string
}

func play(t *testing.T, script []action) []string {
	m := &machine{w: newWorld(t), started: time.Now()}
	for n := range people {
		m.people = append(m.people, &person{Participant: livekit.Participant{Room: fmt.Sprint("call", n%2), Identity: fmt.Sprint(n)}})
	}
	m.w.timers.onKeep, m.w.timers.onGone = m.restarted, m.gone
	m.heal()
	for _, a := range script {
		m.act(a)
		m.check()
	}
	m.finish()
	m.w.Stop()
	return append(m.problems, m.w.timers.problems...)
}

func (m *machine) problem(format string, args ...any) {
	m.problems = append(m.problems, fmt.Sprintf("%s: ", time.Since(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)))+fmt.Sprintf(format, args...))
}

func (m *machine) act(a action) {
	p := m.people[a.who]
	switch a.do {
	case "sleep":
		m.sleep(a.long)
	case "arrive": // as Element Call does
		m.act(action{do: "enter", who: a.who, lost: a.lost})
		m.delegate(p, max(a.long, 10*time.Second), a.token)
	case "delegate":
		m.delegate(p, max(a.long, 10*time.Second), a.token)
	case "enter":
		p.online, p.lostAt, p.dropped = true, time.Now(), false
		if m.w.sfu.enter(p.Participant, livekit.Active) {
			m.moved(p, !a.lost, livekit.ParticipantJoined, "")
		}
	case "exit":
		m.leave(p, !a.lost)
	case "cancel":
		if len(p.timers) > 0 {
			last := p.timers[len(p.timers)-1]
			last.replaced = true
			m.w.timers.end(last.kept)
		}
	case "hint":
		m.w.Hint(livekit.Event{Kind: a.kind, Participant: p.Participant, Reason: a.why})
	case "restart LiveKit":
		m.observe()
		for _, p := range m.people {
			p.dropped = p.dropped || m.w.sfu.has(p.Participant)
			p.lostAt = time.Now()
			if a.lost { // it is stopped gracefully
				m.w.sfu.exit(p.Participant)
				m.w.Hint(livekit.Event{Kind: livekit.ParticipantLeft, Participant: p.Participant, Reason: livekit.ServerShutdown})
			}
		}
		m.trouble()
		m.w.silence(errFault)
		m.w.sfu.set(func(s *fakeSFU) { clear(s.rooms) })
		m.sleep(min(a.long, 20*time.Minute))
		m.heal()
	case "fault of LiveKit":
		m.trouble()
		m.w.silence(errFault)
	case "LiveKit hangs":
		m.trouble()
		m.w.sfu.set(func(s *fakeSFU) { s.hangs = true })
	case "fault of the store":
		m.trouble()
		m.broken = true
		m.w.timers.set(func(f *fakeTimers) { f.written = a.lost })
		m.w.failing(errFault, "find", "delegate", "note", "keep", "finish", "expire")
	case "heal":
		m.heal()
	case "step": // takes effect with the next process
		if a.lost {
			a.long = -a.long
		}
		m.w.step += a.long
	case "crash":
		m.trouble()
		m.w.kill()
		for _, p := range m.people {
			for _, h := range p.timers {
				if row, ok := m.w.timers.rowOf(h.kept); ok && row.Phase == expiration.DelegationWaiting {
					h.forgot = time.Now()
				}
			}
		}
		if a.lost { // somebody leaves meanwhile
			m.leave(p, false)
		}
		m.sleep(a.long)
		m.healStore() // a process does not start without its database
		m.started = time.Now()
		m.w.start()
	}
}

// trouble notes that something is wrong from now on.
func (m *machine) trouble() { m.calm = false }

// heal ends all faults.
func (m *machine) heal() {
	m.w.sfu.set(func(s *fakeSFU) {
		if s.fault != nil || s.hangs {
			m.answers = time.Now()
		}
		s.fault, s.hangs = nil, false
	})
	m.healStore()
	m.calm, m.calmAt = true, time.Now()
	m.observe()
}

func (m *machine) healStore() {
	if m.broken {
		m.broken, m.healed = false, time.Now()
	}
	m.w.failing(nil)
	m.w.timers.set(func(f *fakeTimers) { f.written = false })
}

// leave has a participant crash or leave.
func (m *machine) leave(p *person, hint bool) {
	m.observe()
	p.online, p.dropped = false, false
	m.w.sfu.exit(p.Participant)
	m.moved(p, hint, livekit.ParticipantLeft, "CONNECTION_TIMEOUT")
}

// delegate schedules a timer, and hands it over.
func (m *machine) delegate(p *person, delay time.Duration, token bool) {
	m.timers++
	name := fmt.Sprint(m.timers)
	h := &handedOver{kept: expiration.Kept{Hash: expiration.HashToken(name), Delayed: !token}, delay: delay, at: time.Now()}
	m.w.timers.schedule(h.kept, alice, room, delay)
	p.timers = append(p.timers, h)
	m.w.getsToken(p.Participant)
	var err error
	if token {
		err = m.w.DelegateToken(m.w.t.Context(), h.kept.Hash, func(string, string) (livekit.Participant, error) {
			return p.Participant, nil
		})
	} else {
		err = m.w.DelegateLeave(m.w.t.Context(), Leave{
			UserID: alice, RoomID: room, DelayID: name, MemberKey: [32]byte{1, p.Identity[0]}, Participant: p.Participant,
		})
		for _, older := range p.timers[:len(p.timers)-1] {
			older.replaced = older.replaced || older.kept.Delayed
		}
	}
	if err != nil { // the row may be there, or not
		h.replaced = true
		if m.calm {
			m.problem("a delegation failed: %s", err)
		}
	}
	synctest.Wait()
}

// moved notes that a participant was connected or disconnected just now.
func (m *machine) moved(p *person, hint bool, kind livekit.Kind, why livekit.Reason) {
	p.since = time.Now()
	if hint {
		m.w.Hint(livekit.Event{Kind: kind, Participant: p.Participant, Reason: why})
	}
	m.observe()
}

// observe notes who is connected.
func (m *machine) observe() {
	for _, p := range m.people {
		if m.w.sfu.has(p.Participant) {
			p.life = time.Now()
		}
	}
}

// sleep lets time pass. Participants that lost their connection try to connect for 40 seconds, as LiveKit's clients do.
func (m *machine) sleep(long time.Duration) {
	for end := time.Now().Add(long); time.Now().Before(end); {
		step := time.Second
		if time.Until(end) > time.Minute && !m.trying() {
			step = 15 * time.Second
		}
		time.Sleep(min(step, time.Until(end)))
		synctest.Wait()
		for _, p := range m.people {
			switch {
			case !p.online || m.w.sfu.has(p.Participant):
			case time.Since(p.lostAt) > 40*time.Second:
				p.online, p.dropped, p.since = false, false, time.Now()
			case m.w.sfu.enter(p.Participant, livekit.Active):
				p.dropped = false
				m.moved(p, true, livekit.ParticipantJoined, "")
			}
		}
		m.check()
		m.observe()
	}
}

// trying reports whether somebody tries to connect.
func (m *machine) trying() bool {
	return slices.ContainsFunc(m.people, func(p *person) bool { return p.online && !m.w.sfu.has(p.Participant) })
}

// gone checks that somebody is gone, when that is noted: LiveKit has said so, and not because it was started anew a moment before.
func (m *machine) gone(k expiration.Kept) {
	if m.broken || time.Since(m.healed) <= longestRetry { // it may have been found out before a fault
		return
	}
	for _, p := range m.people {
		for _, h := range p.timers {
			switch {
			case h.kept != k:
			case m.w.sfu.has(p.Participant) && time.Since(p.since) > time.Second:
				m.problem("%s is connected, and was called gone", p.Identity)
			case p.dropped && m.noticed(p, h) && time.Since(later(m.answers, later(p.lostAt, m.started))) < grace-time.Second:
				m.problem("%s was called gone %s after LiveKit was restarted", p.Identity, time.Since(p.lostAt))
			}
		}
	}
}

// noticed reports whether the keeper knows that the participant has come.
func (m *machine) noticed(p *person, h *handedOver) bool {
	return m.w.sfu.toldAt(p.Participant).After(later(h.at, h.forgot))
}

// restarted checks a restart when it happens: there was a sign of life a short time before.
func (m *machine) restarted(k expiration.Kept) {
	for _, p := range m.people {
		for _, h := range p.timers {
			told := m.w.sfu.toldAt(p.Participant)
			switch {
			case h.kept != k, time.Since(h.at) <= fresh, time.Since(told) <= fresh:
			case !k.Delayed && time.Since(later(h.at, m.started)) <= longestWait && !m.noticed(p, h):
			default:
				m.problem("a timer was restarted %s after LiveKit had its participant", time.Since(told))
			}
		}
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

const (
	// noticed is the most that it takes the keeper to notice a participant, or its absence, in calm: the longest pause between two looks.
	noticed = lookTimeout + waitingPause + 2*time.Second
	// lost is the most that it takes in calm until a participant who is no longer there is out of the call.
	lost = lookTimeout + silentPause + lookInterval + grace + longestRetry + 2*time.Second
)

// check checks what must hold at every moment.
func (m *machine) check() {
	synctest.Wait()
	if err := m.w.invariants(); err != nil {
		m.problem("the invariants: %s", err)
	}
	for _, p := range m.people {
		for _, h := range p.timers {
			m.checkTimer(p, h)
		}
	}
}

func (m *machine) checkTimer(p *person, h *handedOver) {
	if h.checked || h.replaced {
		return
	}
	tm, there := m.w.timers.of(h.kept), m.w.sfu.has(p.Participant)
	now := time.Now()
	if tm.ended != "" {
		h.checked, now = true, tm.endedAt
	}

	// Nobody who is connected is thrown out.
	calm := m.calm && now.Sub(later(m.calmAt, later(p.since, h.at))) > noticed
	if tm.ended != "" && there && calm {
		m.problem("%s was thrown out: %s", p.Identity, tm.ended)
	}

	// Whatever dies, the participant is out of the call at most its delay, and half a minute, after the last sign of life; or half a minute
	// after a start or the end of an outage, if nothing could be sent before.
	life := later(p.life, h.at)
	if there {
		life = now
	}
	last := life.Add(h.delay + fresh)
	if !h.kept.Delayed && !m.noticed(p, h) { // a token whose participant has not come
		last = later(last, later(h.at, m.started).Add(longestWait+h.delay))
	}
	last = later(last, later(m.started, m.calmAt).Add(fresh)).Add(time.Second)
	if m.calm && now.After(last) {
		m.problem("%s is a ghost: the last sign of life was %s ago, its delay is %s", p.Identity, now.Sub(life), h.delay)
	}

	// A room is made, because nobody can come without it.
	if tm.ended == "" && calm && m.w.sfu.sid(p.Room) == "" {
		m.problem("there is no room for %s", p.Identity)
	}

	// Nobody waits longer than an hour for a participant.
	if tm.ended == "" && h.kept.Delayed && m.calm && !m.noticed(p, h) && now.Sub(later(later(h.at, m.started), m.calmAt)) > longestWait+noticed {
		m.problem("%s never came, and is not out of the call", p.Identity)
	}

	// Whoever was connected and is not any more is out of the call soon.
	since := later(m.calmAt, later(p.life, h.at))
	if tm.ended == "" && !there && m.calm && m.noticed(p, h) && now.Sub(since) > lost {
		m.problem("%s is gone for %s, and not out of the call", p.Identity, now.Sub(since))
	}
}

// finish ends all faults and lets everybody leave, until nothing is left.
func (m *machine) finish() {
	m.heal()
	m.sleep(10 * time.Minute)
	for n := range m.people {
		m.act(action{do: "exit", who: n, lost: n%2 == 0})
	}
	m.sleep(10 * time.Minute)
	time.Sleep(4 * time.Hour)
	m.check()
	for _, p := range m.people {
		for _, h := range p.timers {
			if tm := m.w.timers.of(h.kept); tm.ended == "" {
				m.problem("a timer of %s still runs", p.Identity)
			}
		}
	}
	m.w.mu.Lock()
	defer m.w.mu.Unlock()
	if len(m.w.kept)+len(m.w.ofMember)+len(m.w.calls)+len(m.w.finishing) > 0 {
		m.problem("memory is not empty")
	}
	require.Empty(m.w.t, m.w.timers.rows)
}
