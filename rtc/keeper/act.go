package keeper

import (
	"context"
	"errors"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

// The work of the workers: looks at LiveKit, and steps of the engine.

const (
	// lookTimeout bounds a look.
	lookTimeout = 5 * time.Second
	// stepTimeout bounds a step. The engine completes what it has begun.
	stepTimeout = 30 * time.Second
)

// errChanged: LiveKit was started anew, or its room made anew, during a look.
var errChanged = errors.New("the room has changed meanwhile")

// look looks at a room of LiveKit, and tells its delegations who is there.
func (k *Keeper) look(c *call) {
	k.mu.Lock()
	c.hinted = false
	k.mu.Unlock()
	asked := time.Now()
	room, sessions, err := livekit.Room{}, []livekit.Session(nil), errPanic
	guard.Run("looking at a room of LiveKit", func() { room, sessions, err = k.ask(c) })
	if k.ctx.Err() != nil {
		return
	}
	states := make(map[string]livekit.State, len(sessions))
	for _, s := range sessions {
		if s.State != livekit.Disconnected {
			states[s.Identity] = s.State
		}
	}
	now := time.Now()
	k.mu.Lock()
	defer k.mu.Unlock()
	wasSilent := false
	for d := range c.delegations {
		wasSilent = wasSilent || d.phase == silent
		state, there := states[d.row.Identity]
		switch {
		case err != nil:
			d.unanswered(now)
		case there:
			d.there(state, room.SID, asked, now)
		default:
			d.absent(room.SID, now)
		}
		d.planLook(now)
		k.planWithMu(&d.task)
	}
	k.answeredWithMu(err, wasSilent)
	if err == nil {
		k.checkWithMu(c, sessions)
	}
}

// ask asks LiveKit who is in a room. If the room is not there, nobody can connect, so it is made for those who have a token. The room has the
// same SID before and after, so LiveKit was not started anew in between, which would empty the list.
func (k *Keeper) ask(c *call) (livekit.Room, []livekit.Session, error) {
	ctx, cancel := context.WithTimeout(k.ctx, lookTimeout)
	defer cancel()
	room, err := k.sfu.Room(ctx, c.name)
	if errors.Is(err, livekit.ErrNotFound) {
		var expected bool
		if expected, err = k.isExpected(ctx, c); err != nil || !expected {
			return room, nil, err
		}
		room, err = k.sfu.CreateRoom(ctx, c.name)
	}
	if err != nil {
		return room, nil, err
	}
	sessions, err := k.sfu.Participants(ctx, c.name)
	if err != nil {
		return room, nil, err
	}
	after, err := k.sfu.Room(ctx, c.name)
	if err == nil && after.SID != room.SID {
		err = errChanged
	}
	return room, sessions, err
}

// isExpected reports whether somebody may connect to a room: whoever was there before, or has a token of ours. A client can hand over timers
// for any number of rooms, and LiveKit need not have those where nobody can come.
func (k *Keeper) isExpected(ctx context.Context, c *call) (bool, error) {
	var identities []string
	k.mu.Lock()
	for d := range c.delegations {
		if d.sid != "" {
			k.mu.Unlock()
			return true, nil
		}
		identities = append(identities, d.row.Identity)
	}
	k.mu.Unlock()
	for _, identity := range identities {
		if _, err := k.store.MemberAt(ctx, c.name, identity); !errors.Is(err, expiration.ErrNotFound) {
			return err == nil, err
		}
	}
	return false, nil
}

// answeredWithMu notes whether LiveKit has answered. When it answers again for a room that it did not answer for, all such rooms are looked
// at now, because those whose LiveKit was started anew have to be made again.
func (k *Keeper) answeredWithMu(err error, wasSilent bool) {
	if err != nil {
		k.metrics.looks.WithLabelValues("silent").Inc()
		if k.silentSince.IsZero() {
			k.silentSince = time.Now()
			k.log.WithError(err).Warn("LiveKit does not answer. Nobody counts as gone until it does")
		}
		return
	}
	k.metrics.looks.WithLabelValues("answered").Inc()
	if !k.silentSince.IsZero() {
		k.log.Infof("LiveKit answers again, after %s", time.Since(k.silentSince).Round(time.Second))
		k.silentSince = time.Time{}
	}
	if !wasSilent {
		return
	}
	for _, c := range k.calls {
		for d := range c.delegations {
			if d.phase == silent {
				c.hinted = true
			}
		}
		k.planWithMu(&c.task)
	}
}

// act does the next step of a delegation, if it is due.
func (k *Keeper) act(d *delegation) {
	unlock, err := k.rows.Lock(k.ctx, d.row.NID)
	if err != nil {
		return
	}
	defer unlock()
	begun := time.Now()
	s, written, ok := k.begin(d, begun)
	if !ok {
		return
	}
	defer k.finished(d, s)
	err = errPanic
	guard.Run("keeping a timer alive", func() { err = k.do(d, s, written) })

	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case err == nil && s == finish:
		k.endWithMu(d, "finished")
	case isOver(err):
		k.endWithMu(d, "over")
	default:
		if err != nil && k.ctx.Err() == nil {
			if d.failures[s] == 0 {
				k.log.WithError(err).WithField("step", s.String()).Warn("A step of a delegation failed, and is repeated")
			}
			k.metrics.failures.WithLabelValues(s.String()).Inc()
		}
		d.done(s, written, err, begun, time.Now())
	}
}

// begin returns the step that is due, and what a note has to write.
func (k *Keeper) begin(d *delegation, now time.Time) (s step, written expiration.SessionNote, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s, at := d.next()
	switch {
	case at.IsZero() || at.After(now):
		return s, written, false
	case s == keep && !d.mayKeep(now):
		d.due[keep] = time.Time{}
		return s, written, false
	case s == finish && k.finishing[d.row.UserID] == userPlaces:
		d.due[finish] = now.Add(shortestPause)
		return s, written, false
	case s == finish:
		k.finishing[d.row.UserID]++
	}
	return s, d.note(), true
}

// finished gives back what begin has taken.
func (k *Keeper) finished(d *delegation, s step) {
	if s != finish {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.finishing[d.row.UserID]--; k.finishing[d.row.UserID] == 0 {
		delete(k.finishing, d.row.UserID)
	}
}

// do has the engine do a step.
func (k *Keeper) do(d *delegation, s step, written expiration.SessionNote) error {
	ctx, cancel := context.WithTimeout(k.ctx, stepTimeout)
	defer cancel()
	switch s {
	case note:
		return k.timers.NoteSession(ctx, []expiration.SessionNote{written})
	case keep:
		return k.timers.KeepAlive(ctx, d.row.Kept)
	case check:
		row, err := k.timers.Find(ctx, d.row.Kept, "", "")
		if err == nil {
			k.mu.Lock()
			defer k.mu.Unlock()
			d.resize(row.Duration, time.Now())
		}
		return err
	default:
		return k.timers.Finish(ctx, d.row.Kept)
	}
}

// isOver reports whether the engine says that the timer has ended, or is about to.
func isOver(err error) bool {
	return errors.Is(err, expiration.ErrNotFound) || errors.As(err, new(*expiration.FinalisedError)) || errors.As(err, new(*expiration.DropError))
}
