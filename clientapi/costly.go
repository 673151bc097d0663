package clientapi

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"

	userapi "github.com/matrix-org/dendrite/userapi/api"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/keylock"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
)

const (
	// maxWaiting is how many costly requests of a user may run or wait at a time.
	maxWaiting = 16
	// sendsApart is how long a user's send of an expiring event keeps the user's next one waiting. A send that takes longer may hang, and
	// must not keep the user out of other rooms.
	sendsApart = 3 * time.Second
)

// begin admits a request that schedules a delayed event, or looks some up. Such a request costs the server more than it costs the client.
// A user's requests run one after the other, so that many at once take no more memory and CPU time than one. Requests above the limit are
// refused with a *rateError. An application service's requests are always admitted at once. done may be called more than once.
func (a *API) begin(req *http.Request, device *userapi.Device) (done func(), err error) {
	if device.AccountType == userapi.AccountTypeAppService {
		return func() {}, nil
	}
	if err = mayRequest(a.users, device); err != nil {
		return nil, err
	}
	switch done, err = a.costly.Lock(req.Context(), device.UserID); {
	case errors.Is(err, keylock.ErrCrowded):
		return nil, &rateError{retryAfter: time.Second}
	case err != nil:
		return nil, err
	}
	return sync.OnceFunc(done), nil
}

// mayRequest counts a request of a user, and returns a *rateError if it is above the limit. Application services are exempt.
func mayRequest(users *limits.Limiter[string], device *userapi.Device) error {
	if device.AccountType == userapi.AccountTypeAppService {
		return nil
	}
	if wait := users.Wait(device.UserID, time.Now()); wait > 0 {
		return &rateError{retryAfter: wait}
	}
	return nil
}

// beginExpiring waits until the user's previous send of an expiring event is over, or takes longer than sendsApart. Events that set state
// cost much more than their requests do. One after the other, a user's sends delay the events of others no more than one send does. Sends of
// an application service do not wait. done may be called more than once.
func (a *API) beginExpiring(ctx context.Context, device *userapi.Device) (done func(), err error) {
	if device.AccountType == userapi.AccountTypeAppService {
		return func() {}, nil
	}
	unlock, err := a.sends.Lock(ctx, device.UserID)
	if err != nil {
		return nil, err
	}
	unlock = sync.OnceFunc(unlock)
	overdue := time.AfterFunc(sendsApart, unlock)
	return func() { overdue.Stop(); unlock() }, nil
}
