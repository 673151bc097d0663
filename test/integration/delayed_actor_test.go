//go:build all

package integration

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// delayedEntry is the ledger's record of one delayed event of a client. No expiring event has the same state key, so a delayed event never
// replaces one.
type delayedEntry struct {
	n        int
	path     string
	body     JSON
	delay    time.Duration
	id       string    // the delay ID; "" until there is an answer
	earliest time.Time // the earliest time at which the server may send it by itself
	done     bool      // a request for it was refused, or it was cancelled or sent
	decided  bool      // cancel or send was requested, so its delay no longer decides whether and when it is sent

	sent, cancelled bool // the request was answered with 200
	cancelling      bool // the cancel request had no answer
}

// finalisedKept is how many finalised events of a user the server keeps.
const finalisedKept = 1000

// delayedLimit limits how many delayed events an actor acts on at the same time.
const delayedLimit = 8

// stepDelayed makes one request about delayed events.
func (a *actor) stepDelayed(ctx context.Context) error {
	if a.unscheduled != nil {
		return a.schedule(ctx, a.unscheduled)
	}
	choice := a.random.IntN(10)
	if len(a.scheduled) == 0 || choice < 4 && len(a.scheduled) < delayedLimit {
		return a.schedule(ctx, a.newDelayedEntry())
	}
	i := a.random.IntN(len(a.scheduled))
	e := a.scheduled[i]
	if e.done && time.Now().After(e.earliest) {
		a.scheduled = append(a.scheduled[:i], a.scheduled[i+1:]...)
		return nil
	}
	switch {
	case e.n%2 == 0 && !e.done: // half of them are left to their delay
		e.done = time.Now().After(e.earliest)
		return a.pause(ctx)
	case choice < 8:
		return a.restartDelayed(ctx, e)
	default:
		return a.decideDelayed(ctx, e, choice == 8)
	}
}

func (a *actor) newDelayedEntry() *delayedEntry {
	e := &delayedEntry{n: len(a.delays), delay: time.Duration(500+a.random.IntN(2000)) * time.Millisecond}
	e.body = JSON{"delay_ms": e.delay.Milliseconds(), "content": JSON{"delayed": e.n}}
	eventType := "m.room.message"
	if a.random.IntN(2) == 0 {
		eventType = memberType
		e.body["state_key"] = fmt.Sprint("delayed", a.random.IntN(actorKeys))
	}
	e.path = fmt.Sprintf("/_matrix/client/v3/rooms/%s/delayed_event/%s/delayed%d", url.PathEscape(a.roomID), eventType, e.n)
	a.delays = append(a.delays, e)
	return e
}

// schedule schedules an event, for the first time or again.
func (a *actor) schedule(ctx context.Context, e *delayedEntry) error {
	if a.unscheduled != e {
		e.earliest = time.Now().Add(e.delay)
	}
	a.unscheduled = e
	res, err := a.request(ctx, http.MethodPut, e.path, e.body)
	if err != nil {
		return err
	}
	a.unscheduled = nil
	if res.Code != http.StatusOK {
		a.ledger.fault("schedule: %s", res)
		return nil
	}
	a.s.remember(res)
	e.id = res.Get("delay_id").Str
	a.scheduled = append(a.scheduled, e)
	return nil
}

func (a *actor) restartDelayed(ctx context.Context, e *delayedEntry) error {
	asked := time.Now()
	res, err := a.actOnDelayed(ctx, e, "restart")
	switch {
	case err != nil:
		return err
	case res.Code == http.StatusOK && (e.sent || e.cancelled):
		a.ledger.fault("delayed event %d was restarted after it was over", e.n)
	case res.Code == http.StatusOK:
		e.earliest = asked.Add(e.delay)
	case !e.decided && time.Now().Before(e.earliest):
		a.ledger.fault("delayed event %d was refused to be restarted while it must be scheduled: %s", e.n, res)
	default:
		e.done = true
	}
	return nil
}

// decideDelayed sends a delayed event, or cancels it.
func (a *actor) decideDelayed(ctx context.Context, e *delayedEntry, send bool) error {
	action := "cancel"
	if send {
		action = "send"
	}
	certain := !e.decided && time.Now().Before(e.earliest.Add(-100*time.Millisecond))
	e.decided = true
	res, err := a.actOnDelayed(ctx, e, action)
	switch {
	case err != nil:
		e.cancelling = e.cancelling || !send
		return err
	case res.Code == http.StatusOK && (send && e.cancelled || !send && e.sent):
		a.ledger.fault("delayed event %d came to two ends", e.n)
	case res.Code == http.StatusOK:
		e.sent, e.cancelled, e.done = e.sent || send, e.cancelled || !send, true
	case certain && time.Now().Before(e.earliest):
		a.ledger.fault("%s of delayed event %d was refused while it must be scheduled: %s", action, e.n, res)
	default:
		e.done = true
	}
	return nil
}

// actOnDelayed makes a request without an access token, as an SFU does.
func (a *actor) actOnDelayed(ctx context.Context, e *delayedEntry, action string) (homeserver.Response, error) {
	res, err := a.request(ctx, http.MethodPost, unstableDelayed+"/"+e.id+"/"+action, nil)
	if err == nil && res.Code != http.StatusOK && res.Code != http.StatusNotFound {
		a.ledger.fault("%s of a delayed event: %s", action, res)
	}
	return res, err
}

// checkDelayed: each delayed event was sent exactly once, not early, and as it was claimed. A cancelled event was not sent.
func (l *ledger) checkDelayed(ctx context.Context, events []roomEvent) {
	for _, a := range l.actors {
		sent := map[int][]roomEvent{}
		for _, e := range events {
			if n := e.json.Get("content.delayed"); n.Exists() && e.sent && e.json.Get("room_id").Str == a.roomID {
				sent[int(n.Int())] = append(sent[int(n.Int())], e)
			}
		}
		for _, e := range a.delays {
			found := sent[e.n]
			switch n := len(found); {
			case n > 1:
				l.fault("delayed event %d of %s was sent %d times", e.n, a.roomID, n)
			case n == 1 && e.cancelled:
				l.fault("delayed event %d of %s was cancelled, and sent as %s", e.n, a.roomID, found[0])
			case n == 0 && !e.cancelled && !e.cancelling:
				l.fault("delayed event %d of %s was never sent (sent: %t)", e.n, a.roomID, e.sent)
			}
			if e.n < len(a.delays)-finalisedKept { // the server no longer has it
				continue
			}
			shown, err := a.Do(ctx, http.MethodGet, stableDelayed+"/"+e.id, nil)
			if err != nil || shown.Code != http.StatusOK || !shown.Get("finalised").Exists() || shown.Get("finalised.error").Exists() {
				l.fault("delayed event %d of %s was not finalised: %s %v", e.n, a.roomID, shown, err)
				continue
			}
			if len(found) == 0 {
				continue
			}
			if early := e.earliest.Sub(time.UnixMilli(found[0].timestamp())); !e.decided && early > time.Millisecond {
				l.fault("delayed event %d of %s was sent %s early", e.n, a.roomID, early)
			}
			if id := shown.Get("finalised.event_id").Str; id != found[0].id {
				l.fault("delayed event %d of %s is %s, and was finalised as %s", e.n, a.roomID, found[0], id)
			}
			if claimed := l.delayedClaims[expiration.HashToken(e.id)]; claimed != "" && claimed != found[0].id {
				l.fault("delayed event %d of %s was claimed as %s and sent as %s", e.n, a.roomID, claimed, found[0])
			}
		}
	}
}
