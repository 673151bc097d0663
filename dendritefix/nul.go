package dendritefix

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strings"

	"github.com/gorilla/mux"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"
)

// RefuseNUL is a middleware for client routes. It refuses a transaction ID with a NUL character.
//
// PostgreSQL stores no NUL in a text, and Dendrite writes the transaction ID of an event into its sync database. If the write fails, the
// process ends, and JetStream redelivers the event after each start.
//
// This file can go when Dendrite refuses such transaction IDs and ignores such relations and redactions.
func RefuseNUL(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		vars := mux.Vars(req)
		// Dendrite's routes use both names. The path is still escaped.
		if !strings.Contains(vars["txnID"], "%00") && !strings.Contains(vars["txnId"], "%00") {
			next.ServeHTTP(w, req)
			return
		}
		refuse(w, spec.InvalidParam("The transaction ID must not have a NUL character"))
	})
}

// refuse answers a request with 400.
func refuse(w http.ResponseWriter, e spec.MatrixError) {
	util.SetCORSHeaders(w)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusBadRequest)
	_ = json.NewEncoder(w).Encode(e)
}

// Unstorable reports whether an event's content has a NUL character in a field that Dendrite writes into a column of its own. These fields
// are the relation of the event, and the ID of the event that it redacts. PostgreSQL does not store a NUL. The sync API then retries the
// same event for ever, so no /sync returns anything new, and the roomserver does not answer.
func Unstorable(content []byte) bool {
	if !bytes.Contains(content, []byte(`\u0000`)) { // there is no other spelling in JSON
		return false
	}
	var relation gomatrixserverlib.RelationContent
	if json.Unmarshal(content, &relation) == nil && relation.Relations != nil &&
		(hasNUL(relation.Relations.EventID) || hasNUL(relation.Relations.RelationType)) {
		return true
	}
	var redaction struct {
		Redacts string `json:"redacts"`
	}
	return json.Unmarshal(content, &redaction) == nil && hasNUL(redaction.Redacts)
}

func hasNUL(text string) bool { return strings.ContainsRune(text, 0) }
