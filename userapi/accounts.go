// Package userapi connects the engine to Dendrite's user API. It cancels a user's delayed events when the account is deactivated, and
// reports which accounts are deactivated.
package userapi

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/gomatrixserverlib/spec"
)

// Accounts reports which accounts of this server are deactivated. It reads Dendrite's table, because no call of the user API distinguishes
// a deactivated account from one without password and devices. Application services and their users have such accounts.
type Accounts struct {
	db         *sql.DB
	serverName spec.ServerName // of requests that name none

	mu     sync.Mutex     // guards ending
	ending map[string]int // how many deactivations of an account are under way, by its user ID
}

// NewAccounts opens the database of Dendrite's user API. Dendrite creates the table later.
func NewAccounts(cm *sqlutil.Connections, options *config.DatabaseOptions, serverName spec.ServerName) (*Accounts, error) {
	db, _, err := cm.Connection(options)
	if err != nil {
		return nil, fmt.Errorf("opening the database of accounts: %w", err)
	}
	return &Accounts{db: db, serverName: serverName, ending: map[string]int{}}, nil
}

const deactivatedSQL = "SELECT is_deactivated FROM userapi_accounts WHERE localpart = $1 AND server_name = $2"

// Deactivated reports whether an account is deactivated, or is being deactivated. It is false for an account that does not exist.
func (a *Accounts) Deactivated(ctx context.Context, userID string) (bool, error) {
	a.mu.Lock()
	ending := a.ending[userID] > 0
	a.mu.Unlock()
	if ending {
		return true, nil
	}
	user, err := spec.NewUserID(userID, true)
	if err != nil {
		return false, err
	}
	var deactivated sql.NullBool
	err = a.db.QueryRowContext(ctx, deactivatedSQL, user.Local(), user.Domain()).Scan(&deactivated)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return deactivated.Bool, err
}

// end makes an account count as deactivated until the returned function is called.
func (a *Accounts) end(userID string) (done func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ending[userID]++
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.ending[userID]--; a.ending[userID] == 0 {
			delete(a.ending, userID)
		}
	}
}
