//go:build all

package integration

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/fakelivekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// callPoints are the places where TestCrashesOfCalls kills the server: all steps of a delegation, and those that it takes with its timer.
var callPoints = []failpoint.Point{
	failpoint.BeforeDelegation, failpoint.AfterDelegation, failpoint.BeforeRefresh, failpoint.AfterRefresh, failpoint.BeforeSession,
	failpoint.BeforeClaim, failpoint.AfterClaim, failpoint.AfterClosing, failpoint.AfterLoad,
}

// insist repeats a request, as clients do, until it is answered with 200. It starts the server when it has crashed.
func (c *call) insist(t *testing.T, u *user, method, path string, body any) homeserver.Response {
	t.Helper()
	for began := time.Now(); ; {
		res, err := u.Do(t.Context(), method, path, body)
		if err == nil && res.Code == http.StatusOK {
			c.remember(res)
			return res
		}
		if time.Since(began) > afterCrash {
			t.Fatalf("%s %s: %v %v", method, path, res, err)
		}
		c.restore(t)
		time.Sleep(pollInterval)
	}
}

// restore starts the server if it has crashed, without further crashes.
func (c *call) restore(t *testing.T) {
	t.Helper()
	select {
	case <-c.Ended():
		c.crashes++
		require.NoError(t, c.Failpoints())
		require.NoError(t, c.Start(t.Context()))
	default:
	}
}

// The server crashes at each step while a participant comes and goes. Each leave is sent, once, and nobody else leaves.
func TestCrashesOfCalls(t *testing.T) {
	onEachCall(t, startWithFailpoints, func(t *testing.T, c *call) {
		stays := c.join(t, c.users[1])
		hits, rounds := map[failpoint.Point]int{}, 0
		for _, point := range callPoints {
			rounds++
			before := c.crashes
			c.crashInCall(t, point, rounds, stays)
			hits[point] += c.crashes - before
		}
		t.Logf("%d rounds, crashed at the chosen place: %v", rounds, hits)
		for _, point := range callPoints {
			require.NotZero(t, hits[point], "never came to %s", point)
		}
		require.False(t, stays.delayed(t, stays.delayID).Get("finalised").Exists(), "who stays")
		leaves := map[int]int{}
		for _, e := range c.users[0].timeline(t, c.roomID) {
			if round := e.Get("content.round"); round.Exists() {
				leaves[int(round.Int())]++
			}
		}
		for round := 1; round <= rounds; round++ {
			require.Equal(t, 1, leaves[round], "leaves in round %d", round)
		}
	})
}

// crashInCall has a participant join and leave a call, on a server that crashes at a point meanwhile.
func (c *call) crashInCall(t *testing.T, point failpoint.Point, round int, stays participant) {
	t.Helper()
	u := c.users[0]
	passes := 1
	if point == failpoint.BeforeRefresh || point == failpoint.AfterRefresh { // the first is that of the one who stays
		passes = 2 + round%2
	}
	require.NoError(t, c.Stop())
	require.NoError(t, c.Failpoints(fmt.Sprintf("%s kill %d", point, passes)))
	if err := c.Start(t.Context()); !errors.Is(err, homeserver.ErrEnded) {
		require.NoError(t, err)
	}
	insist := func(method, path string, body any) homeserver.Response { return c.insist(t, u, method, path, body) }
	p := participant{user: u}
	get := func() {
		openID := insist(http.MethodPost, "/_matrix/client/v3/user/"+url.PathEscape(u.UserID)+"/openid/request_token", JSON{}).Get("@this").Value()
		body := JSON{"room": c.roomID, "openid_token": openID, "device_id": "DEV"}
		if p.delayID != "" {
			body["delay_id"], body["delay_timeout"] = p.delayID, c.delay.Milliseconds()
		}
		p.token = insist(http.MethodPost, servicePath+"/sfu/get", body).Get("jwt").Str
		claims, err := fakelivekit.Verify(p.token)
		require.NoError(t, err)
		p.Room, p.Identity = claims.Video.Room, claims.Subject
	}
	get()
	require.NoError(t, c.liveKit.Enter(p.token))
	p.delayID = insist(http.MethodPut, fmt.Sprintf("/_matrix/client/v3/rooms/%s/delayed_event/%s/round%d", url.PathEscape(c.roomID), memberType, round), JSON{
		"delay_ms": c.delay.Milliseconds(), "state_key": "_" + u.UserID + "_DEV", "content": JSON{"gone": u.UserID, "round": round},
	}).Get("delay_id").Str
	get()
	for until := time.Now().Add(c.delay); time.Now().Before(until); time.Sleep(pollInterval) {
		c.restore(t)
		require.False(t, c.isFinal(t, p), "%s is connected", p.Identity)
	}
	c.liveKit.Leave(p.Room, p.Identity)
	eventuallyWithin(t, c.delay+afterCrash, "the leave is sent", func() bool {
		c.restore(t)
		return c.isFinal(t, p)
	})
	c.restore(t)
	require.False(t, c.isFinal(t, stays), "%s stays", stays.Identity)
}

// isFinal reports whether the leave of a participant is over, unless the server has crashed.
func (c *call) isFinal(t *testing.T, p participant) bool {
	t.Helper()
	res, err := p.Do(t.Context(), http.MethodGet, stableDelayed+"/"+p.delayID, nil)
	return err == nil && res.Get("finalised").Exists()
}
