package userapi

import (
	"cmp"
	"context"
	"fmt"

	"github.com/matrix-org/dendrite/userapi/api"
	"github.com/sirupsen/logrus"
)

// Canceller cancels what a user has scheduled, and waits for what is being sent.
type Canceller interface {
	CancelAll(ctx context.Context, userID string) error
}

// API wraps Dendrite's user API. It must be given to Dendrite's client API in its place. Where it is not, no event of a deactivated
// account is sent either, see [Accounts], but the events stay scheduled until they are due.
type API struct {
	api.UserInternalAPI
	accounts  *Accounts
	scheduled Canceller
}

// New returns a wrapper of Dendrite's user API.
func New(inner api.UserInternalAPI, accounts *Accounts, scheduled Canceller) *API {
	return &API{UserInternalAPI: inner, accounts: accounts, scheduled: scheduled}
}

// PerformAccountDeactivation implements api.ClientUserAPI. It cancels first, so that a fault of our database is known before
// anything has happened, and the user, who can log in no more, need not repeat what failed halfway. From then on the account counts
// as deactivated: a join that is due when Dendrite has taken the user out of the rooms, and not yet marked the account, is not sent.
func (a *API) PerformAccountDeactivation(
	ctx context.Context, req *api.PerformAccountDeactivationRequest, res *api.PerformAccountDeactivationResponse,
) error {
	userID := fmt.Sprintf("@%s:%s", req.Localpart, cmp.Or(req.ServerName, a.accounts.serverName))
	// A client that hangs up does not leave an account half deactivated.
	ctx = context.WithoutCancel(ctx)
	defer a.accounts.end(userID)()
	if err := a.scheduled.CancelAll(ctx, userID); err != nil {
		return err
	}
	if err := a.UserInternalAPI.PerformAccountDeactivation(ctx, req, res); err != nil {
		return err
	}
	// A request that had its access token checked before can have scheduled more. It would not be sent, so this is for its content.
	if err := a.scheduled.CancelAll(ctx, userID); err != nil {
		logrus.WithError(err).WithField("user_id", userID).Warn("Failed to cancel what a deactivated account has scheduled, will do so when it is due")
	}
	return nil
}
