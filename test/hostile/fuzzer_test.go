//go:build all

package hostile

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	stablePath   = "/_matrix/client/v1/delayed_events"
	unstablePath = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events"
	// requestsAtOnce is small, because the test is about the events, and not about the server's load.
	requestsAtOnce = 4
	// settled limits how long after its due time a delayed event may be finalised, on a busy machine.
	settled = 90 * time.Second
)

// fuzzer sends inputs to a server, and checks the outcome of each.
type fuzzer struct {
	s     *server
	found *findings
	users []*homeserver.Client
	rooms *roomPool

	txns     atomic.Int64
	requests chan struct{} // one slot for each request in flight
	mu       sync.Mutex
	// recent are the inputs in flight and those that were just due. They are the suspects if the process ends.
	recent map[*input]time.Time
	// tokens are the tokens of expiring events. delayed are the delay IDs of events that are not yet known to be finalised.
	tokens  map[string]*input
	delayed map[string]*input
	// accepted and refused count the inputs.
	accepted, refused atomic.Int64
	died              atomic.Bool
}

func newFuzzer(s *server, users []*homeserver.Client) *fuzzer {
	return &fuzzer{
		s: s, found: newFindings(), users: users, rooms: newRoomPool(users), requests: make(chan struct{}, requestsAtOnce),
		recent: map[*input]time.Time{}, tokens: map[string]*input{}, delayed: map[string]*input{},
	}
}

// do sends a request and makes the checks that every answer must pass. It returns false if there was no answer.
func (f *fuzzer) do(ctx context.Context, in *input, c *homeserver.Client, method, path string, body any) (homeserver.Response, bool) {
	f.requests <- struct{}{}
	defer func() { <-f.requests }()
	f.s.awaitUp(ctx)
	restarts, before := f.s.restarts.Load(), time.Now()
	res, err := c.Do(ctx, method, path, body)
	took := time.Since(before)
	what := fmt.Sprintf("%s %.300s", method, path)
	switch {
	case ctx.Err() != nil || f.died.Load():
		return res, false
	case restarts != f.s.restarts.Load() && (err != nil || res.Code >= http.StatusInternalServerError):
		return res, false
	case err != nil && !f.s.alive():
		f.died.Store(true)
		f.found.add("the process ended", in, "during %s", what)
		return res, false
	case err != nil:
		f.found.add("no answer", in, "%s: %.300s", what, err)
		return res, false
	case took > patience:
		f.found.add("a request hangs", in, "%s took %s", what, took)
	}
	return res, true
}

// run executes an input, and returns when its event is finalised or its deadline has passed.
func (f *fuzzer) run(ctx context.Context, in *input, user int) {
	c := f.users[user]
	p, err := f.place(ctx, in.Version, user)
	if err != nil {
		f.found.add("a room cannot be created", in, "%s", err)
		return
	}
	txn := fmt.Sprintf("hostile%d", f.txns.Add(1))
	path, body := in.request(p, txn)
	f.suspect(in, time.Now())
	res, ok := f.do(ctx, in, c, http.MethodPut, path, body)
	if !ok {
		return
	}
	f.check(ctx, in, c, p, "PUT "+path, res)
	if in.Repeat {
		again, ok := f.do(ctx, in, c, http.MethodPut, path, body)
		first, second := res.Get("delay_id").Str, again.Get("delay_id").Str
		if ok && first != "" && second != first && strings.HasSuffix(strings.Split(path, "?")[0], txn) {
			f.found.add("a transaction is repeated", in, "%.300s: %s, then %s", path, res, again)
		}
		if second != first { // a state event, which has no transaction ID
			defer f.settle(ctx, in, c, second)
		}
		f.remember(in, again)
	}
	f.rooms.used(in.Version, user, res.Code == http.StatusForbidden)
	due := f.remember(in, res)
	if res.Code != http.StatusOK {
		f.refused.Add(1)
		f.forget(in)
		return
	}
	f.accepted.Add(1)
	f.suspect(in, due)
	sleep(ctx, time.Duration(in.AfterMS)*time.Millisecond)
	if f.act(ctx, in, c, p, res) { // the timer may have started again
		due = time.Now().Add(time.Until(due)).Add(time.Duration(in.DelayMS)*time.Millisecond + time.Duration(in.Expires)*time.Second)
	}
	sleep(ctx, time.Until(due))
	f.settle(ctx, in, c, res.Get("delay_id").Str)
}

// place returns a room for an input.
func (f *fuzzer) place(ctx context.Context, version string, user int) (p place, err error) {
	for range 3 { // because the server may be restarted meanwhile
		f.s.awaitUp(ctx)
		if p, err = f.rooms.get(ctx, version, user); err == nil || f.died.Load() {
			break
		}
	}
	return p, err
}

// remember stores the token or delay ID of an accepted event, and returns when the event is due.
func (f *fuzzer) remember(in *input, res homeserver.Response) time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	if token := res.Get("expire_refresh_token").Str; token != "" {
		f.tokens[token] = in
		return time.Now().Add(time.Duration(in.Expires) * time.Second)
	}
	if id := res.Get("delay_id").Str; id != "" {
		f.delayed[id] = in
	}
	return time.Now().Add(time.Duration(in.DelayMS) * time.Millisecond)
}

// act performs the action of an input. It returns true if the action moved the due time.
func (f *fuzzer) act(ctx context.Context, in *input, c *homeserver.Client, p place, sent homeserver.Response) bool {
	method, path, body := http.MethodPost, stablePath+"/"+sent.Get("delay_id").Str, any(nil)
	switch in.Action {
	case "":
		return false
	case "list":
		method, path = http.MethodGet, unstablePath
	case "look":
		method = http.MethodGet
	case "refresh", "end":
		method, path, body = http.MethodPut, "/_matrix/client/v3/expiration/"+in.Action, JSON{"expire_refresh_token": sent.Get("expire_refresh_token").Str}
	default:
		path += "/" + in.Action
	}
	res, ok := f.do(ctx, in, c, method, path, body)
	if ok {
		f.check(ctx, in, c, p, in.Action, res)
	}
	return in.Action == "restart" || in.Action == "refresh"
}

// check adds a finding if an answer is an error of the server. If a plain send of the same event fails in the same way, the fault is stock
// Dendrite's.
func (f *fuzzer) check(ctx context.Context, in *input, c *homeserver.Client, p place, what string, res homeserver.Response) {
	if res.Code < http.StatusInternalServerError {
		return
	}
	sends := what == "send" || in.Form == expiring && strings.HasPrefix(what, "PUT ")
	if sends {
		path, body := in.plain(p, fmt.Sprintf("plain%d", f.txns.Add(1)))
		if plain, ok := f.do(ctx, in, c, http.MethodPut, path, body); ok && plain.Code == res.Code {
			f.found.note("a plain send of %s fails the same way: %s", in.Type, plain)
			return
		}
	}
	f.found.add(fmt.Sprintf("%d on %.4s", res.Code, what), in, "%.300s: %s", what, res)
}

// settle waits until a delayed event is finalised.
func (f *fuzzer) settle(ctx context.Context, in *input, c *homeserver.Client, id string) {
	if id == "" || ctx.Err() != nil {
		f.forget(in)
		return
	}
	pause := 200 * time.Millisecond
	for deadline := time.Now().Add(settled); ; {
		res, ok := f.do(ctx, in, c, http.MethodGet, stablePath+"/"+url.PathEscape(id), nil)
		switch {
		case ctx.Err() != nil || f.died.Load():
			return
		case ok && res.Code == http.StatusNotFound:
			f.found.add("a delayed event is lost", in, "looked up: %s", res)
		case ok && res.Code >= http.StatusInternalServerError:
			f.found.add("a look-up fails", in, "%s", res)
		case !ok || res.Get("finalised").Exists() == res.Get("finalised_ts").Exists(): // not finalised yet, or no answer
			if !time.Now().After(deadline) {
				sleep(ctx, pause)
				pause = min(2*pause, 5*time.Second)
				continue
			}
			f.found.add("neither done nor scheduled", in, "%.500s", res)
			return
		default:
			f.note(res)
		}
		f.forget(in)
		f.mu.Lock()
		delete(f.delayed, id)
		f.mu.Unlock()
		return
	}
}

// note counts the outcome of a delayed event.
func (f *fuzzer) note(res homeserver.Response) {
	final := res.Get("finalised")
	if !final.Exists() {
		final = res.Get("@this")
	}
	switch {
	case final.Get("event_id").Exists():
		f.found.note("sent")
	case final.Get("error").Exists():
		f.found.note("ended with an error: %s", final.Get("error.errcode"))
	default:
		f.found.note("cancelled")
	}
}

func (f *fuzzer) suspect(in *input, due time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.recent[in] = due
}

func (f *fuzzer) forget(in *input) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.recent, in)
}

// suspects returns the inputs that may have ended the process: those that were just due, the latest first.
func (f *fuzzer) suspects() (all []*input) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	for in, due := range f.recent {
		if due.Before(now) {
			all = append(all, in)
		}
	}
	slices.SortFunc(all, func(a, b *input) int { return f.recent[b].Compare(f.recent[a]) })
	return all
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
