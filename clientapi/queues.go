package clientapi

import (
	"context"
	"net/http"
	"sync"
	"time"

	userapi "github.com/matrix-org/dendrite/userapi/api"
)

// begin is called for each request that schedules a delayed event, or looks some up: each of them is worth more to the server than it
// costs the client. done may be called more than once. A user's are dealt with one after the other, and those that are too many are refused with a *rateError. An
// application service's are neither.
func (a *API) begin(req *http.Request, device *userapi.Device) (done func(), err error) {
	if device.AccountType == userapi.AccountTypeAppService {
		return func() {}, nil
	}
	if wait := a.users.Wait(device.UserID, time.Now()); wait > 0 {
		return nil, &rateError{retryAfter: wait}
	}
	if done, err = a.queues.begin(req.Context(), device.UserID); err != nil {
		return nil, err
	}
	return sync.OnceFunc(done), nil
}

// queues lets one request of each user begin when the one before it is done, so that many at once take no more of memory and
// processors than one does.
type queues struct {
	mu    sync.Mutex // guards users, and the counts of the queues; a leaf
	users map[string]*queue
}

type queue struct {
	free     chan struct{} // has a value while nobody has begun
	requests int           // that wait, or have begun
}

// maxWaiting is how many requests of a user may wait.
const maxWaiting = 16

// begin waits for the user's earlier requests. Its error is a *rateError if too many wait, and else that of the context.
func (q *queues) begin(ctx context.Context, userID string) (done func(), err error) {
	q.mu.Lock()
	user := q.users[userID]
	if user == nil {
		user = &queue{free: make(chan struct{}, 1)}
		user.free <- struct{}{}
		q.users[userID] = user
	}
	if user.requests > maxWaiting {
		q.mu.Unlock()
		return nil, &rateError{retryAfter: time.Second}
	}
	user.requests++
	q.mu.Unlock()
	leave := func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		if user.requests--; user.requests == 0 {
			delete(q.users, userID)
		}
	}
	select {
	case <-user.free:
		return func() { user.free <- struct{}{}; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}
