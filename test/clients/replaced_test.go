//go:build all

package clients

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// membership returns the path of a membership in the call.
func (c call) membership(stateKey string) string {
	return homeserver.StatePath(c.roomID, memberType, stateKey)
}

// replace sets alice's membership as bob. If cancels is true, it makes the server cancel alice's delayed event for that, and otherwise keep
// it, whatever the server does by itself. Alice's requests about the event wait meanwhile. A kept event that the server has cancelled is
// scheduled again, and the proxy gives it the old delay ID.
func (c call) replace(ctx context.Context, p *proxy, stateKey string, content any, cancels bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	before, err := allScheduled(ctx, c.asAlice)
	if err != nil {
		return err
	}
	if _, err = must(ctx, c.asBob, http.MethodPut, c.membership(stateKey), content); err != nil {
		return err
	}
	after, err := allScheduled(ctx, c.asAlice)
	if err != nil {
		return err
	}
	for delayID, e := range before {
		_, kept := after[delayID]
		switch {
		case cancels:
			_, err = must(ctx, c.asAlice, http.MethodPost, unstableEvents+"/"+delayID+"/cancel", nil)
		case !kept:
			var again homeserver.Response
			path := fmt.Sprintf("%s?org.matrix.msc4140.delay=%d", c.membership(stateKey), e.Get("delay").Int())
			again, err = must(ctx, c.asAlice, http.MethodPut, path, []byte(e.Get("content").Raw))
			p.rename(delayID, again.Get("delay_id").Str)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Another user sets the state of alice's membership. Some servers cancel her delayed event for that, others keep it. matrix-js-sdk gets
// along with both: she is in the call afterwards, and her leave event comes when she is gone, and not before.
func TestAnotherUsersState(t *testing.T) {
	t.Parallel()
	for _, cancels := range []bool{true, false} {
		t.Run(map[bool]string{true: "cancels", false: "keeps"}[cancels], func(t *testing.T) { testAnotherUsersState(t, cancels) })
	}
}

func testAnotherUsersState(t *testing.T, cancels bool) {
	var (
		p     *proxy
		users call           // before anyone is in it
		ready sync.WaitGroup // for p and users
		once  sync.Once
	)
	ready.Add(2)
	// The first time is after her leave event was scheduled, and before her membership is sent.
	s := setting{before: func(c call) { users = c; ready.Done() }, joins: usualJoin}
	if cancels {
		s.joins = []string{"schedule 200", "join 200", "restart 404", "schedule 200", "restart 200"}
	}
	s.through = func(server string) string {
		p = newProxy(t, server, func(req *http.Request) {
			_, stateKey, membership := strings.Cut(req.URL.EscapedPath(), memberType+"/")
			if !membership || req.Method != http.MethodPut || req.URL.Query().Has("org.matrix.msc4140.delay") {
				return
			}
			once.Do(func() {
				ready.Wait()
				key, err := url.PathUnescape(stateKey)
				if err == nil {
					err = users.replace(t.Context(), p, key, homeserver.JSON{}, cancels)
				}
				if err != nil {
					t.Error(err)
				}
			})
		})
		ready.Done()
		return p.url
	}
	c := begin(t, s)

	stateKey := c.scheduled.StateKey
	var other homeserver.JSON
	require.NoError(t, json.Unmarshal(do(t, c.asBob, http.MethodGet, c.membership(stateKey), nil).Body, &other))
	other["copied"] = true // Dendrite ignores state that is in the room already
	for _, content := range []homeserver.JSON{{}, other} {
		for len(c.bob.members) > 0 {
			<-c.bob.members
		}
		replaced := time.Now()
		require.NoError(t, c.replace(t.Context(), p, stateKey, content, cancels))
		c.alice.await(t, c.alice.requests, "a join", func(l line) bool {
			return l.Request == "join" && l.Status == 200 && l.at.After(replaced)
		})
		c.bob.sees(t, c.asAlice.UserID, c.asBob.UserID)
	}
	c.aliceStays(t)
	require.Len(t, scheduled(t, c.asAlice), 1, "her other leave events were cancelled")
	c.aliceVanishes(t, syscall.SIGKILL)
}
