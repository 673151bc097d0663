package keeper

import (
	"slices"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

// A delegation's phases and the transitions between them. Nothing here waits, or calls anybody. The package comment has the table.

// phase is where a delegation is in its life.
type phase uint8

const (
	waiting   phase = iota // LiveKit has never had the participant
	connected              // LiveKit has the participant
	missing                // LiveKit no longer has the participant, who may come back at once
	silent                 // LiveKit does not answer
	gone                   // the timer must end, and must not be restarted again
	over                   // nothing is left to do, and memory forgets the delegation
)

// follows says to which phases each phase may change.
var follows = map[phase][]phase{
	waiting:   {connected, gone, over},
	connected: {missing, silent, over},
	missing:   {connected, silent, gone, over},
	silent:    {connected, missing, over},
	gone:      {over},
}

func (p phase) String() string {
	return [...]string{"waiting", "connected", "missing", "silent", "gone", "over"}[p]
}

const (
	// longestWait is how long a participant may take to connect. A delayed leave with a shorter delay waits only for its delay.
	longestWait = time.Hour
	// fresh is for how long after a sign of life the timer may be restarted. So a participant is out of the call, at the latest, its delay
	// and this after the last sign of life.
	fresh = 30 * time.Second
	// grace is how long a participant may be missing after LiveKit, or the way to it, was away. LiveKit's clients try for 40 seconds or so.
	grace = 20 * time.Second
	// confirmed is how long a participant must be missing if a webhook has just said so, and there is no reason for a grace. A second
	// connection under the same identity replaces the first, and in between LiveKit has neither. unheard is the same without a webhook: a
	// client that connects anew is missing for a moment, and the webhook that would say so may be late or lost.
	confirmed, unheard = 250 * time.Millisecond, 3 * time.Second
	// rejoinDoubt is for how long after a connection LiveKit may not list it: the end of an older connection under the same identity takes the
	// newer one from LiveKit's list, until that one changes.
	rejoinDoubt = 2 * time.Second

	// lookInterval is how often a connected participant is looked for. LiveKit deletes a room 20 seconds after the last participant has left,
	// which must not come first.
	lookInterval = 15 * time.Second
	// shortestPause is the least time between two looks that nobody has hinted at.
	shortestPause = time.Second
	// waitingPause and silentPause bound the pauses, which grow, in these phases.
	waitingPause = time.Minute
	silentPause  = 10 * time.Second
	// checkInterval is how often the engine is asked whether a timer still runs. A client may have ended it, and nobody tells. waitingCheck is
	// the same for a delegation that waits.
	checkInterval = 5 * time.Minute
	waitingCheck  = 10 * time.Second
	// shortestRestart bounds how often a timer is restarted.
	shortestRestart = 500 * time.Millisecond
	// firstRetry is the pause after a step that failed. It doubles with each further failure, up to longestRetry.
	firstRetry   = 500 * time.Millisecond
	longestRetry = 30 * time.Second
)

// step is something that a delegation needs from the engine.
type step uint8

const (
	note   step = iota // the row learns of a change
	keep               // the timer is restarted
	check              // the engine is asked whether the timer still runs
	finish             // the timer ends, and the event is sent
	steps
)

func (s step) String() string { return [...]string{"note", "keep", "check", "finish", "none"}[s] }

// returning are the reasons for the end of a session after which a client mostly comes back.
var returning = []livekit.Reason{
	livekit.ServerShutdown, livekit.StateMismatch, livekit.Migration, livekit.SignalClose, "DUPLICATE_IDENTITY",
}

// delegation is a timer that is kept alive. Keeper.mu guards all of it but row, which does not change.
type delegation struct {
	row      expiration.Delegation // as it was accepted or loaded
	duration time.Duration         // the timer's
	task     task                  // its next step
	call     *call

	phase phase
	since time.Time // when the phase began, or was loaded
	sid   string    // the SID of the room in which the participant was seen last, or ""

	// taken is when this process accepted the delegation, or zero. seen is when LiveKit last had the participant, to this process's
	// knowledge, or zero. What an earlier process has seen is nothing to restart a timer for.
	taken, seen time.Time
	waitUntil   time.Time // waiting: when it ends
	until       time.Time // missing: when the participant counts as gone
	doubt       time.Time // until then LiveKit's webhooks give a reason why the participant may be missing in passing
	left        time.Time // when a webhook last said that a session of the participant has ended

	lookAt   time.Time        // when to look for the participant, or zero
	due      [steps]time.Time // when each step is to be done, or zero
	failures [steps]int       // how often each step has failed in a row
}

// accept returns a new delegation, whose row was just written.
func accept(row expiration.Delegation, now time.Time) *delegation {
	d := &delegation{row: row, duration: row.Duration, since: now, taken: now, lookAt: now}
	d.waitUntil = now.Add(d.longestWait())
	d.due[keep] = now
	d.planCheck(now)
	return d
}

// load returns the delegation of an earlier process. wall is the time of day, by which alone the row's times can be understood.
func load(row expiration.Delegation, now, wall time.Time) *delegation {
	d := &delegation{row: row, duration: row.Duration, since: now, sid: row.RoomSID, lookAt: now}
	switch row.Phase {
	case expiration.DelegationGone:
		d.phase, d.lookAt = gone, time.Time{}
		d.due[finish] = now
		return d
	case expiration.DelegationConnected:
		d.phase = connected
	default:
		d.waitUntil = now.Add(d.longestWait() - max(0, wall.Sub(row.Taken)))
		if !row.Delayed {
			d.due[keep] = now
		}
	}
	d.planCheck(now)
	return d
}

// longestWait is for how long the participant may take to connect.
func (d *delegation) longestWait() time.Duration {
	if d.row.Delayed {
		return min(longestWait, d.duration)
	}
	return longestWait
}

// become changes the phase. It reports false, and changes nothing, if the table does not have this transition.
func (d *delegation) become(p phase, now time.Time) bool {
	if !slices.Contains(follows[d.phase], p) {
		return false
	}
	d.phase, d.since = p, now
	return true
}

// there notes that LiveKit has the participant, as it answered to a question that was asked at a time.
func (d *delegation) there(state livekit.State, sid string, asked, now time.Time) {
	if d.phase >= gone {
		return
	}
	d.seen = asked
	if state == livekit.Joining { // not connected yet, and not gone either
		if d.phase == silent {
			d.miss(true, now)
		}
		return
	}
	if d.become(connected, now) {
		d.due[note], d.due[keep] = now, now
	}
	if d.sid != sid {
		d.sid, d.due[note] = sid, now
	}
	if d.due[keep].IsZero() { // it was left out because LiveKit had not answered for too long
		d.due[keep] = now
	}
}

// absent notes that LiveKit does not have the participant, in a room with this SID.
func (d *delegation) absent(sid string, now time.Time) {
	switch d.phase {
	case waiting:
		// The event of a token expires by itself, because it is no longer kept alive. Until then its participant may still come.
		if d.row.Delayed && !now.Before(d.waitUntil) {
			d.lose(now)
		}
	case connected:
		d.miss(sid != d.sid, now)
	case silent:
		d.miss(true, now)
	case missing:
		if sid != d.sid { // LiveKit was started anew since the last look
			d.mayReturn(d.since.Add(grace))
		}
		if !now.Before(d.until) {
			d.lose(now)
		}
	}
}

// unanswered notes that LiveKit does not answer.
func (d *delegation) unanswered(now time.Time) {
	if d.become(silent, now) {
		d.due[keep] = now
	}
}

// miss begins to wait for the participant's return. With a grace the timer is kept alive until it is over.
func (d *delegation) miss(graceful bool, now time.Time) {
	if !d.become(missing, now) {
		return
	}
	d.until, d.due[keep] = now.Add(unheard), time.Time{}
	switch {
	case graceful:
		d.until = now.Add(grace)
	case now.Sub(d.left) < unheard:
		d.until = now.Add(confirmed)
	}
	d.mayReturn(d.doubt)
	if d.until.Sub(now) > unheard {
		d.due[keep] = now
	}
}

// mayReturn notes that the participant may be missing in passing until a time.
func (d *delegation) mayReturn(until time.Time) {
	if until.After(d.doubt) {
		d.doubt = until
	}
	if last := d.since.Add(grace); until.After(last) {
		until = last
	}
	if d.phase == missing && until.After(d.until) {
		d.until = until
	}
}

// lose notes that the participant is gone. That is written down before the timer ends, so that no later process restarts it.
func (d *delegation) lose(now time.Time) {
	if d.become(gone, now) {
		d.lookAt, d.due = time.Time{}, [steps]time.Time{note: now}
	}
}

// end notes that nothing is left to do.
func (d *delegation) end(now time.Time) {
	if d.become(over, now) {
		d.lookAt, d.due = time.Time{}, [steps]time.Time{}
	}
}

// resize notes the timer's duration, which changes if a client sends an expiring event again.
func (d *delegation) resize(duration time.Duration, now time.Time) {
	if d.duration != duration && d.phase < gone {
		d.duration, d.due[keep] = duration, now
	}
}

// planLook sets when to look next, after a look.
func (d *delegation) planLook(now time.Time) {
	var pause time.Duration
	switch d.phase {
	case waiting:
		pause = min(now.Sub(d.since)/2, waitingPause)
		if left := d.waitUntil.Sub(now); d.row.Delayed && left > 0 { // the last looks come closer together, so that nobody is missed
			pause = min(pause, left/2)
			if left < 2*shortestPause {
				d.lookAt = d.waitUntil
				return
			}
		}
	case connected:
		pause = min(d.duration/4, lookInterval)
	case missing:
		if left := d.until.Sub(now); left > 0 && left < shortestPause {
			d.lookAt = d.until
			return
		}
	case silent:
		pause = min(now.Sub(d.since)/2, silentPause)
	default:
		d.lookAt = time.Time{}
		return
	}
	d.lookAt = now.Add(max(pause, shortestPause))
}

// next returns the next step, and when it is due. The time is zero if there is none.
func (d *delegation) next() (next step, at time.Time) {
	next = steps
	for s, due := range d.due {
		if !due.IsZero() && (at.IsZero() || due.Before(at)) {
			next, at = step(s), due
		}
	}
	return next, at
}

// mayKeep reports whether the timer may be restarted now: there was a sign of life a short time ago. A client that hands over a token
// relies on it being kept alive until the participant connects.
func (d *delegation) mayKeep(now time.Time) bool {
	switch {
	case d.phase >= gone:
		return false
	case d.phase == waiting && !d.row.Delayed:
		return now.Before(d.waitUntil)
	}
	return now.Sub(d.taken) <= fresh || now.Sub(d.seen) <= fresh
}

// note returns what the row is to say.
func (d *delegation) note() expiration.SessionNote {
	n := expiration.SessionNote{NID: d.row.NID, RoomSID: d.sid, Phase: expiration.DelegationConnected}
	if !d.seen.IsZero() {
		n.Seen = d.seen.Round(0).Truncate(time.Millisecond)
	}
	switch d.phase {
	case waiting:
		n.Phase = expiration.DelegationWaiting
	case gone:
		n.Phase = expiration.DelegationGone
	}
	return n
}

// done notes that a step, begun at a time, has succeeded or not. written is what a note has written. An error that ends the delegation is not
// for this method.
func (d *delegation) done(s step, written expiration.SessionNote, err error, begun, now time.Time) {
	if d.due[s].IsZero() { // the phase has changed meanwhile, and does without this step
		return
	}
	if err != nil {
		pause := retryAfter(d.failures[s])
		if s == keep { // the timer must not run out because of the pauses
			pause = min(pause, max(d.duration/16, firstRetry))
		}
		d.due[s] = now.Add(pause)
		d.failures[s]++
		return
	}
	d.failures[s], d.due[s] = 0, time.Time{}
	switch s {
	case note:
		switch is := d.note(); {
		case written.Phase != is.Phase || written.RoomSID != is.RoomSID:
			d.due[note] = now
		case d.phase == gone:
			d.due[finish] = now
		}
	case keep:
		next := begun.Add(max(d.duration/2, shortestRestart))
		if d.phase == connected || d.phase == missing && next.Before(d.until) ||
			d.phase == waiting && !d.row.Delayed && next.Before(d.waitUntil) {
			d.due[keep] = next
		}
		d.planCheck(now)
	case check:
		d.planCheck(now)
	}
}

// planCheck sets when to ask next whether the timer still runs.
func (d *delegation) planCheck(now time.Time) {
	d.due[check] = now.Add(checkInterval)
	if d.phase == waiting {
		d.due[check] = now.Add(waitingCheck)
	}
}

// retryAfter returns the pause after a failure that has followed others.
func retryAfter(failures int) time.Duration {
	return min(firstRetry<<min(failures, 10), longestRetry)
}
