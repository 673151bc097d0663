package clientapi

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/matrix-org/dendrite/setup/config"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/util"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// All costly requests of a user share one limit. Requests of an application service do not count.
func TestRequestsOfAUserAreLimited(t *testing.T) {
	a := New(Config{MaxDelay: time.Hour, UserRequests: twice}, &config.ClientAPI{}, rooms{}, Timers{})
	alice, bob := &userapi.Device{UserID: "@alice:localhost"}, &userapi.Device{UserID: "@bob:localhost"}
	service := &userapi.Device{UserID: "@alice:localhost", AccountType: userapi.AccountTypeAppService}
	for _, device := range []*userapi.Device{alice, alice, bob, service} {
		leave, err := a.enter(httptest.NewRequest(http.MethodGet, "/", nil), device, a.users)
		require.NoError(t, err)
		leave()
	}
	req := httptest.NewRequest(http.MethodPut, "/?org.matrix.msc4140.delay=1", strings.NewReader("{}"))
	txnID := "txn"
	for name, res := range map[string]util.JSONResponse{
		"schedule": a.send(req, alice, target{roomID: "!room:localhost", eventType: "m", txnID: &txnID}),
		"list":     a.list(req, alice),
		"look up":  a.look(req, alice, stable, "id"),
	} {
		require.Equal(t, http.StatusTooManyRequests, res.Code, name)
		require.Equal(t, "1800", res.Headers["Retry-After"], name)
	}
}

// hanging is a Sender of which no send ends until its request is given up. It counts those that have begun.
type hanging struct {
	Sender
	begun atomic.Int64
}

func (h *hanging) LockState(ctx context.Context, _ expiration.StateKey) (func(), error) {
	h.begun.Add(1)
	<-ctx.Done()
	return nil, ctx.Err()
}

// Two sends of expiring events of a user run at a time. Those that hang do not hold up the next one for ever.
func TestSendsOfExpiringEventsTakePlaces(t *testing.T) {
	h := &hanging{}
	a := New(Config{MaxDuration: time.Hour}, &config.ClientAPI{}, rooms{}, Timers{Sender: h}) // has an endless goroutine
	synctest.Test(t, func(t *testing.T) {
		alice, bob := &userapi.Device{UserID: "@alice:localhost"}, &userapi.Device{UserID: "@bob:localhost"}
		service := &userapi.Device{UserID: "@alice:localhost", AccountType: userapi.AccountTypeAppService}
		ctx, giveUp := context.WithCancel(t.Context())
		key := ""
		send := func(ctx context.Context, device *userapi.Device, content string) {
			req := httptest.NewRequestWithContext(ctx, http.MethodPut, "/", strings.NewReader(content))
			go a.send(req, device, target{roomID: "!room:localhost", eventType: "m", stateKey: &key})
			synctest.Wait()
		}
		const expiring, plain = `{"m.will_expire":1}`, `{}`
		send(t.Context(), alice, plain)
		require.EqualValues(t, 1, h.begun.Load(), "a plain send keeps no place")
		send(ctx, alice, expiring)
		send(t.Context(), alice, expiring)
		send(t.Context(), alice, expiring)
		require.EqualValues(t, 3, h.begun.Load(), "the third expiring one of the user waits")
		send(t.Context(), alice, plain)
		require.EqualValues(t, 4, h.begun.Load(), "a plain one does not")
		send(t.Context(), bob, expiring)
		require.EqualValues(t, 5, h.begun.Load(), "nor does another user's")
		send(t.Context(), service, expiring)
		require.EqualValues(t, 6, h.begun.Load(), "nor an application service's")
		giveUp()
		synctest.Wait()
		require.EqualValues(t, 7, h.begun.Load(), "the first send is over")
		send(t.Context(), alice, expiring)
		require.EqualValues(t, 7, h.begun.Load())
		time.Sleep(3 * time.Second)
		synctest.Wait()
		require.EqualValues(t, 8, h.begun.Load(), "the second send hangs")
	})
}

// A request whose body does not arrive keeps no place, so it does not hold up the user's other requests.
func TestSlowBodiesKeepNoPlace(t *testing.T) {
	a := New(Config{MaxDelay: time.Hour, MaxScheduled: 1}, &config.ClientAPI{}, rooms{}, Timers{}) // has an endless goroutine
	synctest.Test(t, func(t *testing.T) {
		alice := &userapi.Device{UserID: "@alice:localhost"}
		ctx, giveUp := context.WithCancel(t.Context())
		defer giveUp()
		for _, query := range []string{"?org.matrix.msc4140.delay=1", ""} {
			body := readerFunc(func([]byte) (int, error) { <-ctx.Done(); return 0, ctx.Err() })
			go a.send(httptest.NewRequest(http.MethodPut, "/"+query, body), alice, target{roomID: "!room:localhost", eventType: "m"})
		}
		synctest.Wait()
		began := time.Now()
		leave, err := a.place(httptest.NewRequest(http.MethodPut, "/", nil), alice)
		require.NoError(t, err)
		require.Zero(t, time.Since(began))
		leave()
	})
}

// A user's requests that would wait behind sixty-two others are refused. Restarts do not wait.
func TestFewRequestsWait(t *testing.T) {
	a := New(Config{}, &config.ClientAPI{}, rooms{}, (&planner{}).timers()) // has an endless goroutine
	synctest.Test(t, func(t *testing.T) {
		alice := &userapi.Device{UserID: "@alice:localhost"}
		ctx, giveUp := context.WithCancel(t.Context())
		defer giveUp()
		req := httptest.NewRequestWithContext(ctx, http.MethodPost, "/", nil)
		for range 64 {
			go a.place(req, alice)
		}
		synctest.Wait()
		res := a.act(req, stable, alice, "id", "send")
		require.Equal(t, http.StatusTooManyRequests, res.Code)
		require.Equal(t, "1", res.Headers["Retry-After"])
		require.Equal(t, http.StatusNotFound, a.act(req, stable, alice, "id", "restart").Code)
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
