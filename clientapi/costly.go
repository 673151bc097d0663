package clientapi

import (
	"errors"
	"net/http"
	"time"

	userapi "github.com/matrix-org/dendrite/userapi/api"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

// enter admits a request that costs the server more than the client. It waits for one of the user's places, and is then refused if it is
// above the limit: refused at once, a hostile client would ask again at once. The body must have been read. leave may be called more than
// once. The error is a *webapi.RateError or the context's.
func (a *API) enter(req *http.Request, device *userapi.Device, limit *limits.Limiter[string]) (leave func(), err error) {
	if leave, err = a.place(req, device); err != nil {
		return nil, err
	}
	if err = webapi.MayRequest(limit, device); err != nil {
		leave()
		return nil, err
	}
	return leave, nil
}

// place is enter for requests whose rate is not limited.
func (a *API) place(req *http.Request, device *userapi.Device) (leave func(), err error) {
	leave, err = a.places.Enter(req.Context(), device)
	if errors.Is(err, limits.ErrCrowded) {
		return nil, &webapi.RateError{RetryAfter: time.Second}
	}
	return leave, err
}
